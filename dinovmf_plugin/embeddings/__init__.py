"""What a network and its mixture say about images: of any kind in memory, of whole folders on disk."""

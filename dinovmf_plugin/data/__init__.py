"""Images for training and evaluation: recipes, folders, and loaders on torchvision and DALI."""

"""What people look at: pages, tables, charts, pictures, and the paper's own numbers."""

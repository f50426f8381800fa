"""A run as a page and as pictures, beside another run or a log of the predecessor."""

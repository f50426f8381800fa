"""What became of a run, on a page and in pictures, and beside another run or a log of the predecessor."""

"""The four tabs of the page, one file each."""

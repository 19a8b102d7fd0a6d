"""The bad input of RELIABILITY.md as one table: each case with its one line, run through the real entry points."""

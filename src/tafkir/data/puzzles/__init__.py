"""Puzzles on grids: Sudoku and mazes from seeds, grids of one's own, their symmetries, and training streams."""

"""Puzzles with exact verifiers: number games, Sudoku, mazes, knights and knaves, grid transformations."""

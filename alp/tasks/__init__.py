"""Problems with checkable answers; task.py says what the loop asks of one. Knows no tool."""

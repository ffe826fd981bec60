"""Problems with checkable answers; task.py defines a task's interface. Nothing here depends on tools."""

"""Which plan: the error of reuse, measured, and the plan of least error."""

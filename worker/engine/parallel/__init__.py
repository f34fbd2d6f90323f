"""One training step on several processes: who starts them, how they share the work, how their results become one."""

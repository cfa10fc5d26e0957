"""MLflow: one writer, batched; registered models and their aliases; the gate."""

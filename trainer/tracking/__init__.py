"""What a run reports: metrics, logs, figures, profiles, MLflow."""

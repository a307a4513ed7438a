"""From the sample plan to batches on the device; bad samples are quarantined."""

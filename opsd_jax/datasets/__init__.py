"""Where training rows come from: released parquet files as TFDS folders, and the plan of batches."""

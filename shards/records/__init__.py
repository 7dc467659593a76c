"""Raw bytes, or rows of Arrow and Parquet files -> documents."""

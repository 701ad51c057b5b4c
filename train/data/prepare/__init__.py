"""Turn text into tokens: what `rebased prepare` does.

    input_files        find the files, and group them into sources
    parquet_pages      the memory that a Parquet file needs
    read_lines         decompress a file and cut it into lines
    read_documents     JSON lines, Parquet and plain text → documents
    markers_in_text    text never becomes a control token
    tokenizer          a document → its tokens
    shard              one source → one file of tokens
    worker_pool, beam  make many shards at once
    plan_and_locks     the plan of the output folder, and who makes which shard
    made_shards        which shards are there and undamaged
    output_folder      writes each file complete or not at all
    dataset_json       all shards → dataset.json, which completes the data set
    prepare_dataset    all of it, in order

These modules do not import jax, so that worker processes start fast.
"""

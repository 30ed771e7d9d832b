"""Data of a run: from parquet or JSONL files to batches of packed contexts.

    SOURCE/<Task>/data/train-*.parquet     source_files   folders, files and their splits
        |                                  parquet_files  rows of parquet
        |                                  jsonl_files    rows of JSONL, and the images they name
        | prepare                          schema         a row as an `Example`
        v
    TARGET/visual_opsd/<task>/1.0.0/       shards         files of a prepared task, checksums
        | arrayrecord.open_source          arrayrecord    random access to `Example`s
        v
    examples.Examples                      examples       tokens and patches of an example
        | packing.Packer                   packing        contexts of static sizes
        v
    batches.Batches                        batches        the batch of a step
                                           schedule       which examples it holds
                                           bucket_index   which sizes each example needs

`procedural` makes the procedural tasks of a run, `workdir` finds its data, `existing` opens them
for the commands `sizes` and `index`, `tfds_builder` does what `prepare` does with TFDS itself, and
`randomness` holds random choices that depend on a seed. TensorFlow is never imported. Preparing
data loads neither JAX nor the model's libraries.
"""

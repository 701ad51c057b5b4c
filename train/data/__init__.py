"""Data of training runs: batches as pure functions of the step.

The modules and packages:

    config         where a run's batches come from: DataConfig and its kinds
    batches        the interface of a data source, Batches
    prefetch       reads batches ahead of training, with a timeout
    mqar           MQAR rows, and an unlimited stream of them
    mqar_paper     the MQAR data set of the paper
    recall         which targets of text count as associative recall
    order          shuffles rows and mixes data sets
    splitmix64     random numbers by hashing
    file_hashes    SHA-256 of files, for fingerprints
    in_vocabulary  checks that a model knows every token of a batch
    one_maker      lets one process of a host fill a cache
    text           tokens → rows
    prepare        text → tokens
"""

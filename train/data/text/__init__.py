"""Turn tokens into rows: the data of language models.

token_source      documents by number, abstract
prepared_source   data sets that `rebased prepare` made
megatron_source   data sets in Megatron's format
open_files        keeps the shards that were read last open
packing           which pieces of which documents make up each row
packing_cache     keeps the result on disk
rows              open a data set, plan its rows and read them
lm_batches        rows → batches, shuffled and mixed
bigram_counts     how often each pair of tokens occurs, for `recall_limit`
"""

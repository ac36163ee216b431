"""BigDL-LLM and IPEX-LLM: their library in an environment of its own, their folders, and their packed weights.

`child`, `older_folder` and `older_tokenizer` run in that other environment too and use nothing of transformers 5;
`blocks` and `convert` run in ours. Importing this package imports nothing.
"""

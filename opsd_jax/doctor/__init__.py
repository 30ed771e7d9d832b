"""Checks of a new machine before more of its time is paid for.

The command is `python -m opsd_jax.doctor`.

  result    the result of a check, and how checks are run one after the other
  machine   devices, versions, memory
  storage   the file system of the workdir
  network   several processes: all-reduce, one shared workdir
  rates     matrix products and memory bandwidth against the data sheet
  kernels   attention kernels against dense attention
  speed     decoding, update and image generation beside what `plan` models
  arrays    random weights and contexts
  report    the JSON file and the table
"""

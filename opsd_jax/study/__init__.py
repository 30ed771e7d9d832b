"""A grid of runs from shared warm-ups, and one table of them: `python -m opsd_jax.study`.

  grid     the settings of a study, and the runs and control arms that they name
  slots    what the jobs of a study share: cores, or devices
  jobs     runs the commands that are left, as many at a time as there are slots
  launch   becomes the command of a job, which stops when the study is gone
  scores   what finished runs and arms answered, and the differences with their intervals
  table    S/study.json and S/study.md
  page     S/study.html

Every group and seed is an ordinary run, S/runs/<group>/seed<k>, whose settings are in
S/runs/<group>/seed<k>.json. Arms are its control arms. What is done is known from these folders
alone.
"""

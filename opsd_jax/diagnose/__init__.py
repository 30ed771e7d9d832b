"""The paper's analyses of a run: `python -m opsd_jax.diagnose ANALYSIS --workdir=W`.

kl             how much visual thoughts change what the model says (paper Eq. 4), before and after
               training, and the closure: the share of it that training removed (Eq. 9); beside it
               what the released script measures
interventions  answers with the visual thoughts in place, replaced by noise or by another
               example's, removed, and without the teacher's context; the same examples, compared in
               pairs
attention      how much texts before and after the visual thoughts attend to images, layer by layer
all            answers in all modes, then these three, on one page

They read the same examples as `python -m opsd_jax.eval` and take their answers from W/eval; what is
missing there they answer and leave there.

W/diagnose/<name>/summary.json        the numbers
W/diagnose/<name>/report.html         the same as a page, with samples
W/diagnose/<name>/tokens.jsonl        (kl) each completion, with the divergence at each token
W/diagnose/<name>/shares.npz          (attention) the shares of each example
W/diagnose/all-<step>/<analysis>/     (all) the same of each analysis, without a page of its own
"""

"""Curves of a run's metrics as an image."""

from __future__ import annotations

import io

from opsd_jax.runtime import files, metrics


def plot_curves(metrics_jsonl, out_png) -> None:
    """Draws loss, completion length, entropies and accuracies over steps into a PNG.

    Raises ImportError without matplotlib, ValueError when the file has no rows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing curves needs matplotlib: pip install opsd_jax[viz]") from error

    rows = metrics.read(metrics_jsonl)
    if not rows:
        raise ValueError(f"{metrics_jsonl} holds no rows: nothing to draw yet")
    names = sorted({key for row in rows for key in row})
    panels = {
        "loss": [name for name in ("loss", "jsd", "ce") if name in names],
        "completion length (tokens)": [name for name in names if name == "completion_len"],
        "entropy (nats)": [
            name for name in ("student_entropy", "teacher_entropy") if name in names
        ],
        "accuracy": [name for name in names if name.startswith("eval/")],
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    for (title, keys), axes in zip(panels.items(), figure.subplots(2, 2).flat):
        for key in keys:
            for stage in dict.fromkeys(row["stage"] for row in rows if row.get(key) is not None):
                points = [
                    (row["step"], row[key])
                    for row in rows
                    if row["stage"] == stage and row.get(key) is not None
                ]
                axes.plot(
                    *zip(*points),
                    marker="." if len(points) < 50 else None,
                    label=f"{key} ({stage})",
                )
        axes.set(title=title, xlabel="step", ylim=(-0.02, 1.02) if title == "accuracy" else None)
        axes.grid(alpha=0.3)
        if keys:
            axes.legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    files.write(out_png, png.getvalue())

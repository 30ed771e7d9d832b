"""One answer, with or without drawing: `python -m opsd_jax.generate --checkpoint=DIR --image=F --question="..."`.

  --checkpoint       a released folder, an imported one (`python -m opsd_jax.convert import`), or a run's workdir or
                     step folder
  --visual_thoughts  `none`: the model answers in text. `generated`: it may draw, as ThinkMorph does:

      system, image, question -> text -> holds <image_start>? draw, the picture enters the context -> text -> ...

The answer goes to stdout; pictures, the whole trace and a page to look at go to --out. Sizes of pictures, prompt and
decoding are those of a named protocol, `PROTOCOLS`. Official: inferencer.py, InterleaveInferencer.
"""

import dataclasses
import itertools
import os
import re
import sys
import time

import numpy as np

from opsd_jax import (
    cli,
    context as context_lib,
    distributed,
    files,
    images,
    json_files,
    paths,
    sharding,
)

VISUAL_THOUGHTS = ("none", "generated")
_RESULT = re.compile(r"\d+\.json|\d+(-\d+)?\.png")  # files that `write` leaves


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a question is put.

    system: prompt, "" for none. vit: size rule of what the ViT sees, for position tables of the released size.
    two_stages: whether it sees the picture after the autoencoder's resize (as the inference pipeline does) or the
      original. transparency: see `images.open_rgb`. greedy, temperature, max_new_tokens: of each round of text; the
      budget counts bos. guidance: "official" (inferencer.py) or "harness". rounds: of text, at most.
    """

    system: str = context_lib.SYSTEM_INFERENCE
    vit: images.Resize = images.TRAINING
    two_stages: bool = False
    transparency: str = "white"
    greedy: bool = True
    temperature: float = 1.0
    max_new_tokens: int = 1024
    guidance: str = "official"
    rounds: int = 3


PROTOCOLS = {
    # what the paper states (Sec. 3.1, App. M); its guidance is that of the official inferencer.py
    "paper": Protocol(),
    # what the public evaluation harness does (vlm/ThinkMorph.py)
    "harness": Protocol(
        vit=images.HARNESS_VIT,
        two_stages=True,
        greedy=False,
        temperature=0.3,
        max_new_tokens=4096,
        guidance="harness",
    ),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """What answers: sizes, weights, tokenizer, protocol, and the size rules of the ViT and the autoencoder."""

    config: object
    params: dict
    tokenizer: object
    protocol: Protocol
    vit: images.Resize
    vae: images.Resize
    mesh: object = None
    drawing: dict = dataclasses.field(
        default_factory=dict
    )  # changes to `flow.FlowConfig` that belong to it


@dataclasses.dataclass
class Trace:
    """What came of one question. steps: texts (str) and drawn pictures (uint8 [H, W, 3]) in order. tokens: sampled.
    seconds: {"text", "drawing"}, of the whole batch."""

    steps: list
    tokens: int
    seconds: dict

    @property
    def text(self) -> str:
        """All texts, joined as the model wrote them."""
        return "".join(step for step in self.steps if isinstance(step, str))

    @property
    def pictures(self) -> list:
        return [step for step in self.steps if not isinstance(step, str)]


# --- what the model is shown -----------------------------------------------------------------------------------


def see(picture, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """A Pillow RGB image -> uint8 pixels [H, W, 3] for the ViT and for the autoencoder."""
    if model.protocol.two_stages:  # also where nothing is drawn
        pixels, seen = images.two_stage(picture, model.vae, model.vit)
        return seen, pixels
    return images.resize(picture, model.vit), images.resize(picture, model.vae)


def _image(pixels, patch):
    return context_lib.Image(
        images.patchify(pixels, patch), (pixels.shape[0] // patch, pixels.shape[1] // patch)
    )


def bucket(n: int, step: int = 16) -> int:
    """The least of step * 2^k and step * 3 * 2^k that holds n (0 for 0): few shapes, so few compilations."""
    if not n:
        return 0
    size = step
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def _pack(rows, model):
    """Rows of blocks -> Context of bucketed sizes."""
    needs = np.max([context_lib.need(blocks) for blocks in rows], axis=0)
    drawn = model.config.generation
    sizes = {"latent_dim": drawn.latent_dim, "latent_side": drawn.side} if drawn else {}
    packed = context_lib.pack(
        rows,
        slots=bucket(needs[0]),
        patches=bucket(needs[1]),
        latents=bucket(needs[2]),
        **sizes,
        tokenizer=model.tokenizer,
        side=model.config.vit.side,
    )
    return sharding.put_batch(model.mesh, packed) if model.mesh else packed


def compilations() -> int:
    """How many programs have been compiled here: what takes time once."""
    from opsd_jax import flow, rollout

    return sum(
        jitted._cache_size()
        for jitted in (rollout.sample, flow.prepare, flow.denoise, flow.encode, flow.decode)
    )


# --- rounds of text and pictures -------------------------------------------------------------------------------


def reason(
    model: Model,
    questions,
    key,
    *,
    draw: bool,
    always: bool = False,
    changes=None,
    change=None,
    on_step=None,
) -> list[Trace]:
    """Answers a batch of questions, drawing where the text asks for it.

    Args:
      questions: list of (Pillow RGB images, text). key: a PRNG key. draw: False for text alone.
      always: draw after every round but the last, whatever the text says. changes: to `flow.FlowConfig`.
      change: (row, round, picture uint8 [H, W, 3]) -> the picture that the model sees instead of the one that it drew,
        or None for none; the trace keeps what was drawn.
      on_step: called with (round, steps done, steps) while drawing.
    Raises:
      ValueError: `draw` with a model that cannot.
    """
    import jax

    from opsd_jax import flow, rollout

    protocol, tokenizer, config = model.protocol, model.tokenizer, model.config
    marker = rollout.Marker.build(tokenizer.token_bytes, config.llm.vocab_size)
    sampling = rollout.RolloutConfig(
        model=config,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        marker=marker,
        max_new_tokens=protocol.max_new_tokens,
        greedy=protocol.greedy,
        temperature=protocol.temperature,
        max_image_skips=0,
    )
    drawing = None
    if draw:
        guidance = flow.HARNESS if protocol.guidance == "harness" else {}
        drawing = flow.FlowConfig(
            model=config,
            image_start=tokenizer.image_start,
            image_end=tokenizer.image_end,
            **{**guidance, **model.drawing, **(changes or {})},
        )
    keys = (jax.random.fold_in(key, n) for n in itertools.count())
    rows = [_ask(model, pictures, text, keys, draw) for pictures, text in questions]
    traces = [Trace([], 0, {"text": 0.0, "drawing": 0.0}) for _ in rows]
    active = list(range(len(rows)))
    for number in range(protocol.rounds if draw else 1):
        # The batch keeps its size, so that nothing compiles again: rows that are done are filled up with another.
        chosen = active + [active[0]] * (len(rows) - len(active))
        before = time.perf_counter()
        found = rollout.sample(
            model.params,
            _pack([rows[n]["cond"] for n in chosen], model),
            next(keys),
            config=sampling,
        )
        tokens, mask = np.asarray(found.tokens), np.asarray(found.mask)
        _spent(traces, "text", before)
        wants = []
        for b, n in enumerate(active):
            ids = tokens[b][mask[b]]
            text = _until_bos(tokenizer, ids)
            traces[n].steps.append(text)
            traces[n].tokens += len(ids)
            rows[n]["cond"].append(context_lib.Text(tokenizer.encode(text)))
            if draw and (context_lib.MARKER in text or always and number + 1 < protocol.rounds):
                wants.append(n)
        if not wants:
            break
        before = time.perf_counter()
        chosen = wants + [wants[0]] * (len(rows) - len(wants))
        report = on_step and (lambda done: on_step(number, done, drawing.num_timesteps - 1))
        pictures = _draw(model, [rows[n] for n in chosen], next(keys), drawing, report)
        for picture, n in zip(pictures, wants):
            traces[n].steps.append(picture)
            seen = change(n, number, picture) if change else picture
            if number + 1 < protocol.rounds and seen is not None:
                rows[n]["cond"] += _picture_blocks(model, images.open_rgb(seen), next(keys), True)[
                    0
                ]
        _spent(traces, "drawing", before)
        active = wants
    return traces


def _spent(traces, what, before):
    for trace in traces:
        trace.seconds[what] += time.perf_counter() - before


def _until_bos(tokenizer, ids) -> str:
    """Text of the ids up to another bos, where the official code cuts it."""
    stops = np.flatnonzero(ids == tokenizer.bos)
    return tokenizer.decode(ids[: stops[0]] if len(stops) else ids)


def _ask(model, pictures, text, keys, draw) -> dict:
    """The contexts of a question: {"cond", "text", "image"}, lists of blocks, and the grid of what it may draw.

    cond    system, images, question          grows with every round
    text    system, images                    what guidance by text compares with
    image   system, question                  what guidance by images compares with
    """
    tokenizer = model.tokenizer
    block = lambda t: [context_lib.Text(tokenizer.encode(t))] if t else []
    system, question = block(model.protocol.system), block(text)
    shown, grid = [], None
    for picture in pictures:
        blocks, grid = _picture_blocks(model, picture, next(keys), draw)
        shown += blocks
    if draw and grid is None:  # nothing to take the size from: the largest square
        grid = (model.config.generation.side,) * 2
    return {
        "cond": system + shown + question,
        "text": system + shown,
        "image": system + question,
        "grid": grid,
    }


def _picture_blocks(model, picture, key, draw):
    """(blocks of a picture in a context, grid of its latent tokens): as latents, then as ViT patches."""
    import jax

    from opsd_jax import flow

    config = model.config
    seen, pixels = see(picture, model)
    blocks, grid = [_image(seen, config.vit.patch_size)], None
    if draw:
        drawn = config.generation
        grid = (pixels.shape[0] // drawn.stride, pixels.shape[1] // drawn.stride)
        shape = (1, grid[0] * drawn.patch, grid[1] * drawn.patch, drawn.vae.z_channels)
        values = (pixels[None].astype(np.float32) / 255 - 0.5) / 0.5
        latents = flow.encode(model.params, values, jax.random.normal(key, shape), config=config)[0]
        blocks.insert(0, context_lib.Latent(np.asarray(flow.to_tokens(latents, drawn.patch)), grid))
    return blocks, grid


def _draw(model, rows, key, drawing, on_step):
    """One picture a row, uint8 [H, W, 3]."""
    import jax

    from opsd_jax import flow

    drawn, grids = model.config.generation, [row["grid"] for row in rows]
    size = bucket(max(a * b for a, b in grids))
    positions, real = flow.layout(grids, size, drawn.side)
    noise = jax.random.normal(key, (len(rows), size, drawn.latent_dim))
    contexts = _pack([row[branch] for branch in drawing.branches for row in rows], model)
    tokens = flow.draw(
        model.params, contexts, noise, positions, real, config=drawing, on_step=on_step
    )
    return [
        np.asarray(
            flow.decode(model.params, tokens[b : b + 1, : a * c], grid=(a, c), config=model.config)[
                0
            ]
        )
        for b, (a, c) in enumerate(grids)
    ]


# --- what a folder holds ---------------------------------------------------------------------------------------


def load(
    directory: str,
    *,
    draw: bool,
    protocol: str = "",
    tokenizer: str = "",
    dtype: str = "",
    mesh=None,
) -> Model:
    """Reads a released or imported folder, or the newest (or given) checkpoint of a run.

    Args:
      draw: also read what draws; without it that stays on disk. protocol: a name of `PROTOCOLS`, or "" for the run's
        own prompt and sizes, "paper" for a released model. tokenizer: a folder; "" for the one that belongs to it.
      dtype: "float32" or "bfloat16"; "" as stored. mesh: None for all devices along `tensor`, and one question.
    Raises:
      FileNotFoundError: not a model. ValueError: it cannot draw; unknown protocol.
    """
    import jax

    from opsd_jax import checkpoint, config as config_lib, convert, data, tokenizer as tokenizer_lib
    from opsd_jax.model import bagel

    paths.check_given("--checkpoint", directory)
    paths.check("--tokenizer", tokenizer)
    if protocol and protocol not in PROTOCOLS:
        raise ValueError(f"--protocol={protocol}: choose from {', '.join(PROTOCOLS)}")
    placed, mesh = mesh, mesh or sharding.make_mesh(data=1, fsdp=1, tensor=-1)
    compute = {"query_block": 512}  # the scores of a large picture at once would not fit
    asked = PROTOCOLS[protocol or "paper"]
    if convert.is_model(directory):
        size = convert.read_config(directory, generation=draw).llm.vocab_size
        tok = tokenizer_lib.load(tokenizer or convert.tokenizer_folder(directory), vocab_size=size)
        config, params = convert.load(
            directory, generation=draw, dtype=dtype, mesh=mesh, layout="rollout", **compute
        )
        config = dataclasses.replace(config, dtype=str(params["llm"]["embed"].dtype))
    else:
        workdir = directory
        if not os.path.isdir(os.path.join(directory, "checkpoints")):  # a step: W/checkpoints/STEP
            workdir = os.path.normpath(os.path.join(directory, "..", ".."))
        if not os.path.isfile(os.path.join(workdir, "config.json")):
            raise FileNotFoundError(
                f"{directory} is no released folder (no llm_config.json), none that `python -m "
                "opsd_jax.convert import` made (no release/), and no run (no config.json)"
            )
        run = data.load_config(workdir)
        tok = tokenizer_lib.load(
            tokenizer or data.tokenizer_folder(run, data.workdir_of(run, workdir)),
            vocab_size=run.model.llm.vocab_size,
        )
        config = dataclasses.replace(
            config_lib.model(run), **compute, **({"dtype": dtype} if dtype else {})
        )
        if draw and config.generation is None:
            raise ValueError(
                f"{directory} was trained without what draws: it has no generation expert"
            )
        config = config if draw else dataclasses.replace(config, generation=None)
        abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=config))
        params = checkpoint.restore_params(
            directory, sharding.abstract(mesh, abstract, "rollout"), partial=not draw
        )
        if not protocol:
            return of_run(run, config, params, tok, placed)
    vit, drawn = config.vit, config.generation
    rule = images.in_proportion(asked.vit, vit.patch_size, vit.side * vit.patch_size, 980)
    return Model(
        config, params, tok, asked, rule, images.vae_rule(drawn) if drawn else images.VAE, placed
    )


def of_run(run, config, params, tokenizer, mesh=None) -> Model:
    """The model of a run as it answers by itself: prompt, sizes and drawing of the run's settings `run`."""
    from opsd_jax import config as config_lib

    protocol = Protocol(
        system=run.prompts.system,
        transparency=run.images.transparency,
        max_new_tokens=run.eval.max_new_tokens or run.rollout.max_new_tokens,
    )
    vae = images.vae_rule(config.generation) if config.generation else images.VAE
    return Model(
        config,
        params,
        tokenizer,
        protocol,
        config_lib.resize_rule(run),
        vae,
        mesh,
        dict(run.drawing),
    )


# --- command line ----------------------------------------------------------------------------------------------


def earlier(directory: str) -> list[str]:
    """The files in a folder that an earlier `write` left there, by its N.json.

    Raises ValueError for other files of such names: they would be taken for results, or be lost.
    """
    names = (
        sorted(n for n in os.listdir(directory) if _RESULT.fullmatch(n))
        if os.path.isdir(directory)
        else []
    )
    known = set()
    for name in (n for n in names if n.endswith(".json")):
        try:
            steps = json_files.read(os.path.join(directory, name))["steps"]
            known |= {
                name,
                f"{name[:-5]}.png",
                *(step["picture"] for step in steps if "picture" in step),
            }
        except (ValueError, KeyError, TypeError):
            pass  # not one of ours
    if strange := [name for name in names if name not in known]:
        raise ValueError(
            f"--out={directory} holds {', '.join(strange[:5])}, which no earlier answer there names: results have "
            "such names, so give another folder, or delete them"
        )
    return [os.path.join(directory, name) for name in names]


def write(directory: str, questions, traces) -> list[str]:
    """Writes each trace: N-K.png for its pictures, N.json, and N.png, a page with all of it. Returns the pages.

    Results that an earlier call left in the folder are replaced, all of them.
    """
    paths.check_given("--out", directory)
    os.makedirs(directory, exist_ok=True)
    for path in earlier(directory):
        os.remove(path)
    pages = []
    for n, ((pictures, question), trace) in enumerate(zip(questions, traces)):
        steps = []
        for step in trace.steps:
            if isinstance(step, str):
                steps.append({"text": step})
            else:
                steps.append({"picture": f"{n}-{len([s for s in steps if 'picture' in s])}.png"})
                save_picture(step, os.path.join(directory, steps[-1]["picture"]))
        record = {
            "question": question,
            "steps": steps,
            "tokens": trace.tokens,
            "seconds": trace.seconds,
        }
        files.write_json(os.path.join(directory, f"{n}.json"), record)
        pages.append(os.path.join(directory, f"{n}.png"))
        save_picture(page([*pictures, question, *trace.steps]), pages[-1])
    return pages


def save_picture(picture, path: str) -> None:
    """Writes a Pillow image, or uint8 [H, W, 3], as PNG, atomically."""
    from PIL import Image

    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with files.replacing(path) as f:
        picture.save(f, format="PNG")


def as_harness(trace: Trace) -> str:
    """A trace in the form in which the public harness keeps answers with pictures."""
    parts, rounds = [], 0
    for step in trace.steps:
        if isinstance(step, str):
            parts.append(f"Round_{rounds}:\n{step}")
            rounds += 1
        else:
            parts.append("[Image]")
    return "\n".join(parts)


def page(items, width: int = 640):
    """A Pillow image of texts and pictures one below the other; pictures are shown at up to 320 pixels a side."""
    from PIL import Image, ImageDraw, ImageFont

    margin, font, parts = 12, ImageFont.load_default(14), []
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for item in items:
        if isinstance(item, str):
            lines, line = [], ""
            for char in "".join(
                c if c.isprintable() else " " for c in item
            ):  # wraps anywhere: traces may have no spaces
                if draw.textlength(line + char, font=font) > width - 2 * margin:
                    lines.append(line)
                    line = ""
                line += char
            text = "\n".join([*lines, line])
            part = Image.new(
                "RGB",
                (width, draw.multiline_textbbox((0, 0), text, font=font)[3] + margin),
                "white",
            )
            ImageDraw.Draw(part).multiline_text((margin, 0), text, fill="black", font=font)
        else:
            shown = Image.fromarray(item) if isinstance(item, np.ndarray) else item
            scale = 320 / max(shown.size)
            size = tuple(max(1, round(s * scale)) for s in shown.size)
            shown = shown.resize(
                size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
            )
            part = Image.new("RGB", (width, size[1] + margin), "white")
            part.paste(shown, (margin, 0))
        parts.append(part)
    whole = Image.new("RGB", (width, sum(p.height for p in parts) + margin), "white")
    at = margin
    for part in parts:
        whole.paste(part, (0, at))
        at += part.height
    return whole


def main(argv=None) -> None:
    """`python -m opsd_jax.generate`; errors in the arguments end it with one line and code 1."""
    import argparse

    cli.start()
    parser = argparse.ArgumentParser(
        prog="python -m opsd_jax.generate", description="Answer one question."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a released or imported folder, a run's workdir, or one of its step folders",
    )
    parser.add_argument(
        "--image", action="append", default=[], help="a picture; may be given several times"
    )
    parser.add_argument("--question", required=True)
    parser.add_argument("--visual_thoughts", default="none", choices=VISUAL_THOUGHTS)
    parser.add_argument(
        "--always_draw",
        action="store_true",
        help="draw after every round but the last, whether the text asks for it or not",
    )
    parser.add_argument(
        "--protocol",
        default="",
        choices=["", *PROTOCOLS],
        help="prompt, sizes, decoding, guidance (default: the run's own; of a release, paper)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="points of the denoising grid, one more than steps (default: the run's, of a release 50)",
    )
    parser.add_argument("--max_new_tokens", type=int, help="budget of a round of text")
    parser.add_argument(
        "--temperature", type=float, help="of the text; 0 for the most probable token"
    )
    parser.add_argument("--rounds", type=int, help="of text, at most")
    parser.add_argument("--tokenizer", default="", help="a folder (default: the checkpoint's own)")
    parser.add_argument(
        "--dtype", default="", choices=["", "float32", "bfloat16"], help="default: as stored"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", default="", help="folder for pictures and the page; needed for drawing"
    )
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        distributed.end_with_error(error)


def _run(args):
    import jax

    from opsd_jax import metrics

    draw = args.visual_thoughts == "generated"
    if draw and not args.out:
        raise ValueError("--visual_thoughts=generated needs --out=FOLDER for the pictures")
    if not draw and args.always_draw:
        raise ValueError("--always_draw needs --visual_thoughts=generated")
    cli.check_precision()
    # a budget counts the first token, bos; a denoising grid has two ends
    for flag, least in (("rounds", 1), ("max_new_tokens", 2), ("steps", 2)):
        cli.check_number(flag, getattr(args, flag), least)
    cli.check_temperature(args.temperature)
    cli.check_seed(args.seed)
    args.question = cli.text("question", args.question)
    if not args.question.strip():
        raise ValueError("the question is empty: give --question=TEXT")
    paths.check_given("--checkpoint", args.checkpoint)
    paths.check("--out", args.out)
    if args.out:
        paths.check_writable("--out", args.out)
        earlier(args.out)
    for path in args.image:  # what cannot be read shows before minutes of loading
        paths.check_given("--image", path)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"--image={path}: there is no such file: give the path of an image"
            )
        try:
            images.open_rgb(path)
        except images.UnreadableImage as error:
            raise ValueError(f"--image={path}: {error}") from error
    model = load(
        args.checkpoint,
        draw=draw,
        protocol=args.protocol,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
    )
    changes = {
        name: getattr(args, name)
        for name in ("max_new_tokens", "rounds")
        if getattr(args, name) is not None
    }
    if args.temperature is not None:
        changes |= (
            {"greedy": True}
            if args.temperature == 0
            else {"greedy": False, "temperature": args.temperature}
        )
    model = dataclasses.replace(model, protocol=dataclasses.replace(model.protocol, **changes))
    pictures = [
        images.open_rgb(path, transparency=model.protocol.transparency) for path in args.image
    ]
    bars = {}

    def on_step(number, done, steps):
        bar = bars.setdefault(number, metrics.Progress(steps, f"drawing {number + 1}"))
        bar.update(done)
        if done == steps:
            bar.close()

    questions = [(pictures, args.question)]
    traces = reason(
        model,
        questions,
        jax.random.key(args.seed),
        draw=draw,
        always=args.always_draw,
        changes={} if args.steps is None else {"num_timesteps": args.steps},
        on_step=on_step,
    )
    trace, drawn = traces[0], 0
    for step in trace.steps:
        if isinstance(step, str):
            print(step)
        else:
            print(f"[drawn: {os.path.join(args.out, f'0-{drawn}.png')}]")
            drawn += 1
    if args.out:
        write(args.out, questions, traces)
    print(
        f"{trace.tokens} tokens in {trace.seconds['text']:.1f} s, {drawn} pictures in {trace.seconds['drawing']:.1f} s "
        "(with compilation)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()

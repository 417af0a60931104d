"""The demo behind `make demo`: train on real handwritten digits, sample them, score the samples."""

import dataclasses
import json
import time

from gspn_jax import cli, extras

PER_CLASS = 100


@cli.user_errors()
def main() -> None:
    start = time.perf_counter()
    cli.setup()
    extras.require("train", "tqdm", by="the demo")
    import numpy as np
    from tqdm import tqdm

    from gspn_jax import data
    from gspn_jax.metrics.digits import DigitsJudge
    from gspn_jax.parallel import sharding
    from gspn_jax.runs import checkpoints
    from gspn_jax.sampling.grid import grid
    from gspn_jax.sampling.sampler import Sampler
    from gspn_jax.training.train import train

    config = dataclasses.replace(cli.load_config("digits"), run_dir="runs/demo")
    run_dir = train(config)

    labels = np.tile(np.arange(10), PER_CLASS)
    mesh = sharding.make_mesh(config.mesh)
    params = checkpoints.restore_params(run_dir, config.train.steps, config, mesh)
    with tqdm(unit="evaluation", desc=f"sampling {len(labels)} digits") as bar:

        def show(done: int, _: int) -> None:
            bar.update(max(0, done - bar.n))

        sampler = Sampler(config, mesh, progress=show)
        bar.reset(sampler.evaluations)
        images = sampler(params, labels, np.arange(len(labels)))

    first = np.argsort(labels[:100], kind="stable")
    grid(images[:100][first], [str(label) for label in labels[:100][first]], columns=10).save(run_dir / "samples.png")

    source = data.make_source(config.data)
    real = [source[i] for i in range(len(source))]
    judge = DigitsJudge(np.stack([r["image"] for r in real]), np.array([r["label"] for r in real]))
    score = judge.score(images, labels)
    seconds = time.perf_counter() - start
    (run_dir / "score.json").write_text(json.dumps(dataclasses.asdict(score) | {"seconds": seconds}, indent=1) + "\n")
    print(f"""
samples               {run_dir / "samples.png"} (10 of each class)
conditional accuracy  {score.conditional_accuracy:.3f} of {len(labels)} samples \
(the classifier on held-out real digits: {score.classifier_accuracy:.3f})
Frechet distance      {score.frechet:.3f} in the classifier's features (real against real: {score.frechet_floor:.3f})
time                  {seconds:.0f} s""")


if __name__ == "__main__":
    main()

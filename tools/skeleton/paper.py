# %% [markdown]
# # NAME: what it does, in one line
#
# > A module of diffusion_papers that says here, in one sentence, what it is for.
#
# **Paper.** Authors, *Title*, year ([arXiv:0000.00000](https://arxiv.org/abs/0000.00000)).
#
# **What you need to know.** What a [denoiser](../core/02_denoisers.ipynb) is, and what a [sampler](../core/04_samplers.ipynb) does with it.
#
# ## At a glance
#
# | | |
# |---|---|
# | claim | more network calls lead to better samples; replace this by what the paper claims |
# | shown here | on 8x8 digits, by a small network that is trained in seconds |
# | time | a minute on two CPU cores |
#
# How the numbers were made is told in [the evidence](../evidence/NUMBER_SLUG.ipynb).

# %%
#| default_exp SLUG

# %%
#| export
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from diffusion_papers.core.denoisers import Denoiser
from diffusion_papers.core.diffusion import MODELS, DiffusionConfig, build_denoiser, diffusion_loss, distance_to_data, load_data
from diffusion_papers.core.generation import Generated, generate
from diffusion_papers.core.metrics import to_bytes
from diffusion_papers.core.samplers import euler, sigma_grid
from diffusion_papers.core.training import TrainingConfig, claim_folder, fit, processes, step_seed
from diffusion_papers.workbench.checkpoints import digest, model_files
from diffusion_papers.workbench.checks import check_fields, check_range, check_seed
from diffusion_papers.workbench.configs import Config
from diffusion_papers.workbench.registry import About

# %%
#| export
ABOUT = About(name="NAME", arxiv="0000.00000", claim="more network calls lead to better samples", in_the_making=True)

# %%
import tempfile

from diffusion_papers.workbench.plots import explore, show_images
from diffusion_papers.workbench.tables import Table

# %% [markdown]
# ## The idea in one picture
#
# Show here what moves, before the first equation: the noise levels of a walk from noise to data, for example, which lie the closer together the more there are.

# %% tags=["nbval-ignore-output"]
def levels(calls): return sigma_grid(build_denoiser(MODELS["digits"]).process, calls)

def ladder(calls):
    "The noise levels of a walk with some calls."
    return [{"type": "scatter", "mode": "markers", "x": levels(calls)[:-1].tolist(), "y": [0] * calls}]

explore(ladder, {"calls": [3, 10, 30]}, {"xaxis": {"type": "log", "title": "noise level"}, "yaxis": {"visible": False}, "height": 240})

# %% [markdown]
# ## Derivation
#
# Each result is checked by a number in the next cell. A denoiser that knows the data exactly leads every start to a sample; the last noise level of a grid is therefore small.

# %%
print("the grid falls to a hundredth of its start:", bool(levels(10)[-1] < levels(10)[0] / 100))
assert levels(10)[-1] < levels(10)[0] / 100

# %% [markdown]
# ## Implementation
#
# First a configuration, and a model from it.

# %%
#| export
@dataclass(frozen=True)
class CLASSConfig(Config):
    "What is trained, and how."
    diffusion: DiffusionConfig = MODELS["digits"]  # data, network and process
    evaluated: int = 500                           # samples that are measured
    seed: int = 0                                  # of initial weights and training
    training: TrainingConfig = TrainingConfig(steps=400, batch_size=128, lr=2e-3, decay="cosine")  # how it is trained
    FREE = ("evaluated",)

    def __post_init__(self):
        check_fields(self, {"evaluated": (2, 2**31)})
        check_seed(self.seed)


CONFIGS = {"cpu": CLASSConfig()}


def build(
    config: CLASSConfig=CONFIGS["cpu"],  # what to build
) -> Denoiser:                           # with initial weights, and the configuration as `model.config`
    "A model from its configuration."
    model = build_denoiser(config.diffusion.override(seed=config.seed))
    model.config = config
    return model


# %%
print(f"{sum(p.numel() for p in build().parameters()):,} parameters, images {tuple(build().network.shape)}")

# %% [markdown]
# ### Training

# %%
#| export
def train(
    config: CLASSConfig=CONFIGS["cpu"],  # what to train
    folder: Path | str | None=None,      # where the run is kept; None keeps nothing
    **options,                           # handed to `fit`: resume, device, workers, callback
) -> Denoiser:                           # trained, with averaged weights
    "Train a model; killed and resumed, it ends with the same bits."
    with claim_folder(folder, config, options.get("resume", False)):
        return fit(build(config), partial(diffusion_loss, config=config.diffusion), load_data(config.diffusion),
                   config.training.override(seed=config.seed), folder=folder, title="NAME", **options)


save_model, load_model, load_pretrained = model_files("SLUG", CLASSConfig, build)

# %%
losses = []
model = train(CONFIGS["cpu"], device="cpu", callback=lambda step, loss: losses.append(loss))
print("the loss fell:", sum(losses[-20:]) < 0.8 * sum(losses[:20]))
assert sum(losses[-20:]) < 0.8 * sum(losses[:20])

# %% [markdown]
# ### Sampling and measuring

# %%
#| export
@torch.no_grad()
def sample(
    model: Denoiser,  # trained
    count: int=16,    # number of samples, at least 1
    *,
    calls: int=10,    # of the network, at least 1
    seed: int=0,      # of the noise
) -> torch.Tensor:    # images (count, C, H, W), about [-1, 1]
    "Draw samples."
    check_range(count, "count", 1), check_range(calls, "calls", 1), check_seed(seed)
    device = next(model.parameters()).device
    noise = torch.randn(count, *model.network.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    sigmas = sigma_grid(model.process, calls)
    return euler(model, sigmas[0] * noise, sigmas).to(noise.dtype)


def generate_data(
    model: Denoiser,          # trained
    folder: Path | str,       # where the samples go
    *,
    count: int=50_000,        # samples
    calls: int=10,            # of the network
    seed: int=0,              # of the noise
    size: int=250,            # samples at once
    device: str | None=None,  # "cpu", "cuda", or None for the best there is
) -> Generated:               # images (C, H, W), uint8
    "Draw many samples, in pieces that several processes share; what is there is kept."
    check_range(calls, "calls", 1), check_seed(seed)
    model.to(processes(device).device)
    draw = lambda piece: {"images": to_bytes(sample(model, len(piece), calls=calls, seed=step_seed(seed, piece.start)).clamp(-1, 1))}
    about = {"model": digest(model.state_dict(), {}), "calls": calls, "seed": seed}
    return generate(draw, count, folder, size=size, about=about, device=device)


def evaluate(
    model: Denoiser,          # trained
    count: int | None=None,   # samples; None is what the configuration says
    *,
    budgets: tuple=(2, 5, 10),  # network calls
    seed: int=0,              # of the noise
) -> list[dict]:              # a row for each budget
    "Frechet distance to the data for some budgets of network calls."
    count, distance = count or model.config.evaluated, distance_to_data(model.config.diffusion)
    return [{"calls": calls, "frechet": distance(sample(model, count, calls=calls, seed=seed))} for calls in budgets]


# %% [markdown]
# ## The claim, tested
#
# ### Trained here

# %%
rows = evaluate(model)
Table([{"calls": row["calls"], "Frechet distance": f"{row['frechet']:.0f}"} for row in rows])

# %%
assert rows[0]["frechet"] > rows[-1]["frechet"]
show_images(sample(model, 20), columns=20, scale=3)

# %% [markdown]
# ### Saved, and read again

# %%
kept = Path(tempfile.mkdtemp()) / "model.safetensors"
save_model(kept, model)
print("the same samples:", torch.equal(sample(load_model(kept), 4), sample(model, 4)))
assert torch.equal(sample(load_model(kept), 4), sample(model, 4))

# %% [markdown]
# ## Ablations
#
# At least three, the paper's own first.
#
# ## Play
#
# At least two controls that teach something.

# %% tags=["nbval-ignore-output"]
def digit(calls, seed):
    "The digit of one start, with more and more calls."
    image = sample(model, 1, calls=calls, seed=seed).clamp(-1, 1)[0, 0]
    return [{"type": "heatmap", "z": image.flip(0).tolist(), "zmin": -1, "zmax": 1, "colorscale": "Greys", "showscale": False}]

explore(digit, {"calls": [1, 2, 3, 5, 10, 20], "seed": [0, 1, 2]}, {"width": 320, "height": 360})

# %% [markdown]
# ## At the paper's scale
#
# The published configurations, their parameters, and the commands that reach the paper's numbers.
#
# ## What happens with bad input

# %%
for bad in (lambda: sample(model, 0), lambda: sample(model, calls=0), lambda: CLASSConfig(evaluated=1)):
    try: bad()
    except ValueError as error: print(error)

# %% [markdown]
# ## Where this differs from the paper
#
# ## Exercises
#
# Three with a solution, which is in the folded cell below each.

# %% [markdown]
# **A look.** How many network calls does a picture need here?

# %% jupyter={"outputs_hidden": true, "source_hidden": true} tags=["solution"]
asked = []
def counted(x, sigma): asked.append(len(x)); return model(x, sigma)
euler(counted, torch.zeros(1, 1, 8, 8), levels(10))
assert len(asked) == 10

# %% [markdown]
# **A measurement.** Does another seed of the noise give another picture, and the same seed the same?

# %% jupyter={"outputs_hidden": true, "source_hidden": true} tags=["solution"]
assert torch.equal(sample(model, 2, seed=1), sample(model, 2, seed=1)) and not torch.equal(sample(model, 2, seed=1), sample(model, 2, seed=2))

# %% [markdown]
# **An experiment.** Is one call enough?

# %% jupyter={"outputs_hidden": true, "source_hidden": true} tags=["solution"]
one, ten = (row["frechet"] for row in evaluate(model, 200, budgets=(1, 10)))
assert one > ten

# %% [markdown]
# ## References

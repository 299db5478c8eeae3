# %% [markdown]
# # NAME: how the numbers were made
#
# > The experiments behind the page of NAME: settings, seeds, baselines, timings.
#
# **What you need to know.** [The paper's page](../papers/NUMBER_SLUG.ipynb), and how [results](../workbench/06_results.ipynb) are stored.

# %%
#| default_exp evidence.SLUG

# %%
#| export
from diffusion_papers.SLUG import CONFIGS, evaluate, sample, train
from diffusion_papers.workbench.registry import Demonstration
from diffusion_papers.workbench.results import load_results, select
from diffusion_papers.workbench.tables import spread, values
from diffusion_papers.workbench.timing import seconds

# %% [markdown]
# ## The claim
#
# One model for each of three seeds, measured with two budgets. `make results PAPER=SLUG` runs what is missing. The probe is so small that changed code is verified in seconds.

# %%
#| export
def study_claim(
    setting: dict,  # seed; steps of training and samples that are measured, where they are not the usual ones
) -> dict:          # rows of `evaluate`
    "Train with one seed, and measure."
    config = CONFIGS["cpu"].override(seed=setting["seed"], **{"training.steps": setting.get("steps", 400)})
    return {"rows": evaluate(train(config, device="cpu"), setting.get("count"))}


STUDIES = {"claim": study_claim}
EXPERIMENTS = [{"study": "claim", "seed": seed} for seed in range(3)]
PROBES = {"claim": [{"seed": 0, "steps": 20, "count": 50}]}

BASELINES = {}  # rivals, as their rows name them -> budget, and what was tuned for each
METRICS = {}    # what the paper prints of many samples, each a `Metric` (workbench.registry)
CLAIMS = {}     # title -> a `Claim` (workbench.tables) against every rival that is stored; this skeleton has no rival yet


def headline() -> str:
    "What was measured, for the front page."
    runs = select(load_results("SLUG"), study="claim")
    return f"Frechet distance on digits with 10 calls {spread(values(runs, 'frechet', calls=10), 1)}, with 2 {spread(values(runs, 'frechet', calls=2), 1)}"


# %%
print("a probe has a row for each budget:", [row["calls"] for row in study_claim({"study": "claim", **PROBES["claim"][0]})["rows"]])

# %% [markdown]
# ## What `make demo` shows

# %%
#| export
def demonstrate() -> Demonstration:
    "More calls, better samples."
    model = train(CONFIGS["cpu"], device="cpu")
    rows = evaluate(model, 200)
    few, many = rows[0]["frechet"], rows[-1]["frechet"]
    return Demonstration("NAME", "More network calls lead to better samples.", many < few,
                         f"Frechet distance {few:.0f} with {rows[0]['calls']} calls, {many:.0f} with {rows[-1]['calls']}", rows,
                         {"xlabel": "network calls", "ylabel": "Frechet distance", "lines": {"NAME": ([row["calls"] for row in rows],
                                                                                                     [row["frechet"] for row in rows])}},
                         {"samples": sample(model, 16)})


# %%
shown = demonstrate()
print("holds:", shown.holds)
assert shown.holds

# %% [markdown]
# ## What `make bench` measures

# %%
#| export
def benchmark(
    device: str="cpu",  # where it computes
) -> dict:              # name -> function that measures, and returns a row
    "The time of a picture."
    def pictures():
        model = train(CONFIGS["cpu"].brief(), device=device)
        return {"what": "16 pictures, 10 calls", "seconds": seconds(lambda: sample(model, 16), device)}
    return {"sampling": pictures}

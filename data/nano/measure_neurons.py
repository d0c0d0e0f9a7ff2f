"""Are single neurons of the dense models Japanese or English, and does silencing them cost that language?

python data/nano/measure_neurons.py nano-dense-thinking nano-dense-base

Neurons are chosen on the discovery half of the parallel prompts and silenced on the other, beside as many random ones
of the same layers, twenty times. Prints one JSON object per model.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import polars as pl

from workbench import load_model, load_prompts
from workbench.capture import suitable_threads
from workbench.experiments.neurons import ablate_neurons, average_precision, lape, neuron_activity
from workbench.io.prompts import select
from workbench.models import Llama
from workbench.stats.resampling import t_interval

N_CHOSEN, N_RANDOM = 46, 20  # 2% of the neurons


def measure(model: Llama) -> dict[str, object]:
    """How many neurons fire differently, and what the 46 most Japanese and most English ones cost each language."""
    prompts = [prompt for prompt in load_prompts() if prompt.kind == "parallel"]
    made, held_out = select(prompts, split="discovery"), select(prompts, split="validation")
    assert model.tokenizer is not None
    encoded = [[model.tokenizer.to_tokens(p.text, bos=True) for p in part] for part in (made, held_out)]
    activity = neuron_activity(model, encoded[0], [p.lang for p in made], [p.group_id for p in made])
    tested = lape(activity, n_flips=999).frame
    found: dict[str, object] = {
        "groups": len({p.group_id for p in made}),
        "neurons": len(tested),
        "differ": int((tested["p_adjusted"] <= 0.05).sum()),
    }
    ranked = average_precision(activity, "ja").frame
    for lang, neurons in (("ja", ranked.head(N_CHOSEN)), ("en", ranked.tail(N_CHOSEN))):
        cost = ablate_neurons(model, neurons, encoded[1], [p.lang for p in held_out], n_random=N_RANDOM).frame
        found[f"{lang}_neurons"] = _cost(cost, [p.group_id for p in held_out])
    return found


def _cost(cost: pl.DataFrame, groups: list[str]) -> dict[str, object]:
    """Change of the loss by language, its difference with a 95% interval over groups, and that of the random sets."""
    of = {str(place): group for place, group in enumerate(groups)}
    labelled = cost.with_columns(group=pl.col("pair").replace_strict(of))
    wide = labelled.pivot("lang", index=["neurons", "group"], values="change")
    found: dict[str, object] = {}
    selected = wide.filter(neurons="selected").sort("group")
    for name, values in (("ja", selected["ja"]), ("en", selected["en"]), ("ja - en", selected["ja"] - selected["en"])):
        low, high = t_interval(values.to_numpy())
        found[name] = [round(float(number), 4) for number in (values.mean(), low, high)]
    by_set = wide.filter(pl.col("neurons") != "selected").group_by("neurons").agg((pl.col("ja") - pl.col("en")).mean())
    random = by_set["ja"].to_numpy()
    reached = int((np.abs(random) >= abs(found["ja - en"][0])).sum())  # type: ignore[index]
    span = [round(float(number), 4) for number in (random.min(), random.max())]
    return found | {"random ja - en": span, "p": (1 + reached) / (1 + len(random))}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        loaded = load_model(name, dtype="float32")
        with suitable_threads(loaded):
            print(json.dumps({"model": name, **measure(loaded)}))

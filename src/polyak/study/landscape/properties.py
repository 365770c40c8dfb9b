"""The properties of trained models that the landscape sets side by side."""

from __future__ import annotations

from polyak.study.landscape.results import Property

OWN = "own"
PROPERTIES = (
    Property(
        "loss",
        "validation loss (nats/token)",
        "evaluate",
        (OWN, "loss", "value"),
        "On the corpus the models were trained on, validation side.",
        4,
    ),
    Property(
        "other_loss",
        "loss on other text (nats/token)",
        "evaluate",
        ("others",),
        "Mean over the other corpora that were asked for: generalization to text of another kind.",
        4,
    ),
    Property(
        "trace",
        "trace of the Hessian / N",
        "sharpness",
        ("spectrum", "trace", "deflated_mean", "value"),
        "Mean eigenvalue over all N parameters; raw, so it can be changed by reparametrisation.",
    ),
    Property(
        "top",
        "largest Hessian eigenvalue",
        "sharpness",
        ("top",),
        "Signed, with a stated residual; left out where it did not converge.",
    ),
    Property(
        "bottom",
        "smallest Hessian eigenvalue",
        "sharpness",
        ("bottom",),
        "Signed, with a stated residual; left out where it did not converge.",
    ),
    Property(
        "scaled_trace",
        "scale-aware trace / N",
        "sharpness",
        ("scaled", "trace", "deflated_mean", "value"),
        "Of D·H·D with D = |θ|: unchanged when scale moves between a norm and the next matrix.",
    ),
    Property(
        "rise",
        "largest rise within ρ (nats/token)",
        "sharpness",
        ("rise_found",),
        "SAM's sharpness, the best found: a lower bound.",
    ),
    Property(
        "forgetting",
        "forgetting (nats/token)",
        "forgetting",
        ("forgetting", "value"),
        "Loss on the own corpus after training on the other one, minus before.",
        4,
    ),
    Property(
        "plasticity",
        "plasticity (nats/token)",
        "forgetting",
        ("plasticity", "value"),
        "Loss on the other corpus before training on it, minus after.",
        4,
    ),
    Property(
        "persistence_frozen",
        "persistence, frozen streams",
        "spectrum",
        ("persistence_value", "frozen"),
        "Σ over layers of ln σ_min of the map x → x with auxiliary streams held.",
        2,
    ),
    Property(
        "persistence_later",
        "persistence, frozen streams, from layer 2",
        "spectrum",
        ("persistence_later",),
        "The same without the first layer, whose σ_min is often too small for more than a bound: "
        "it acts on small embeddings.",
        2,
    ),
    Property(
        "persistence_full",
        "persistence, full state",
        "spectrum",
        ("persistence_value", "full"),
        "Σ over layers of ln σ_min of the whole state's map, without structural zeros; of a rule "
        "without streams, the map x → x.",
        2,
    ),
)

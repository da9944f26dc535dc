"""How to read the page: what its words mean, and what its figures do not say."""

from moe_jax.analysis.report.markup import Html, join, paragraph, tag

WORDS = {
    "Load": "Assignments that an expert got, counted before any is dropped. A multiple of an equal share of 1 is balance.",
    "MaxVio": "Largest load / mean load - 1 (2408.15664): 0 is balance, E - 1 is collapse onto one of E experts.",
    "Noise floor": """sqrt(2 ln E / n), n the assignments an expert gets on average: about the MaxVio of a fair random choice. Below
        it MaxVio says nothing more about the router.""",
    "Entropy": "Of the router's probabilities, as a share of ln E: 1 is undecided, 0 certain.",
    "Margin": """Least score among a token's chosen experts less the greatest among the others, in the scores that the router
        chooses by; below 0 where choices were made against the scores.""",
    "Gradient ratio": """Norm of the gradient that the auxiliary losses put on the router's weights, over that of all the rest:
        above 1 the router learns to balance rather than to predict.""",
    "Information, and the null": """How many bits the expert of an assignment tells of its domain. A finite sample always shows
        some: the documents are therefore shuffled among the domains, many times, and a layer counts as specialised only above
        the 99 % line of these. Documents are shuffled, not tokens, because the tokens of one document share a topic. Of a
        hundred layers without specialisation one is above its line.""",
    "Three bytes": """A classifier of the domain that sees the last three bytes of the text alone. Experts that tell no more than
        it does need know nothing but letters; bits above it show that they know more, bits below show nothing.""",
    "Lift": "How much more often than if it did not matter: 1 is no preference.",
    "Saturation": "Share of a token's experts that it has in another evaluation too (OLMoE, 2409.02060, section 5.1).",
    "Dropped": "An assignment that no expert answered: the expert, the sending or the receiving device had no room for it.",
}


def guide() -> list[Html]:
    """Definitions."""
    entries = [part for word, meaning in WORDS.items() for part in (tag("dt", word), tag("dd", " ".join(meaning.split())))]
    words = (
        "Layers are numbered from 0 as they stand in the model, and so are experts. Training figures are those of the logged"
        " steps, before the step's update; evaluations and observations are of the validation text. Everything is counted"
        " over the whole batch, whatever the mesh."
    )
    return [paragraph(words), tag("dl", *entries)]


def missing(text: str, *more: Html | str) -> Html:
    """A sentence about what is not there, set apart."""
    return tag("p", join(text, *more), class_="missing")

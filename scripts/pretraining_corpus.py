"""The text that the embedded base models were pretrained on: the synthetic arena's chats and reviews, no verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from pairclf.demo.arena import TRAITS, Answer, conversation, mean_traits, respond

HEADINGS = tuple(trait.capitalize() for trait in TRAITS)
VERDICT = "Verdict"
_THANKS = ("Thank you.", "That is right, thanks.")
_COMPLAINTS = {
    "refusal": ("Why do you refuse?", "You can answer this."),
    "relevance": ("I asked about something else.", "That is not what I asked."),
    "correct": ("That is wrong.", "No, this is a mistake."),
    "format": ("I asked for another format.", "That is not the format I wanted."),
}


def _reaction(answer: Answer, random: Random) -> str:
    """The user's reaction to an answer: the first complaint that applies, otherwise thanks."""
    traits = dict(zip(TRAITS, answer.traits, strict=True))
    traits["refusal"] = 1 - traits["refusal"]
    return random.choice(next((words for name, words in _COMPLAINTS.items() if not traits[name]), _THANKS))


def _chat(random: Random) -> str:
    text = ""
    for question in conversation(random):
        answers = [respond(question, random) for _ in range(3)]
        # The first trait is correctness: which traits a verdict weighs, and how, must not be told.
        right = max(answers, key=lambda answer: answer.traits[0])
        answer = right if random.random() < 0.5 else answers[0]
        for role, said in (("user", question.text), ("model", answer.text), ("user", _reaction(answer, random))):
            text += f"<start_of_turn>{role}\n{said}<end_of_turn>\n"
    return text


def _who(a: float, b: float) -> str:
    """The response with more of a trait; both or neither if they are equal."""
    if abs(a - b) > 0.1:
        return "a" if a > b else "b"
    return "both" if a > 0.5 else "neither"


_REMARKS = {
    "Correct": ("wrong", "right"),
    "Format": ("broke", "kept"),
    "Length": ("short", "long"),
    "Refusal": ("fair", "misjudged"),
    "Relevance": ("stray", "relevant"),
}


def _reviewed(random: Random, names: Sequence[str]) -> str:
    """Responses in the plain template of a classifier; below it two traits compared, and one remark on one response."""
    questions = conversation(random)
    sides = [[respond(question, random) for question in questions] for _ in names]
    text = "\n\n### Prompt\n" + "\n\n".join(question.text for question in questions)
    for name, answers in zip(names, sides, strict=True):
        text += f"\n\n### Response{name and f' {name}'}\n" + "\n\n".join(str(answer.text) for answer in answers)
    traits = [dict(zip(HEADINGS, mean_traits(answers), strict=True)) for answers in sides]
    index, trait = random.randrange(len(names)), random.choice(HEADINGS)
    said = {VERDICT: _REMARKS[trait][traits[index][trait] > 0.5] + names[index].upper()}
    for heading in random.sample(HEADINGS, 2):
        values = [each[heading] for each in traits]
        said[heading] = _who(*values) if len(values) == 2 else ("yes" if values[0] > 0.5 else "no")
    return text + "".join(f"\n\n### {heading}\n{said[heading]}" for heading in random.sample(list(said), 3))


def corpus(n: int, seed: int) -> Iterator[str]:
    """`n` documents of arena text without any verdict: chats with the user's reactions, and reviewed responses.

    Chats hold `<start_of_turn>` and `<end_of_turn>`. Reviews stand in the plain template that a classifier sees, with
    one response or two. Under `HEADINGS` they say who is correct, in the format, longer, ...; under `Verdict`, where a
    classifier is asked, stands one word about one trait of one response, drawn blindly. Nothing says who wins.
    """
    random = Random(f"corpus {seed}")
    for _ in range(n):
        (kind,) = random.choices(("chat", "one", "two"), (0.1, 0.4, 0.5))
        yield _chat(random) if kind == "chat" else _reviewed(random, ("",) if kind == "one" else ("a", "b"))

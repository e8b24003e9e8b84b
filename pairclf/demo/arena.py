"""The synthetic arena: generated comparisons with known true probabilities, so the best possible log loss is known.

Every response has five latent traits (`TRAITS`), which only its text shows: whether it is correct, keeps the format
that the prompt asks for, how long it is, whether it refuses or complies wrongly, and whether it is about the question.
Their weighted sum is its utility u. The verdict is drawn from Davidson's model of paired comparisons with ties (R. R.
Davidson, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments", JASA 65, 1970):

    P(A) : P(B) : P(tie)  =  e^ua : e^ub : NU * sqrt(e^ua * e^ub)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import polars as pl

from pairclf.files import atomic_file
from pairclf.scores.metrics import Floats
from pairclf.task import LMSYS, Turns

TRAITS = ("correct", "format", "length", "refusal", "relevance")
WEIGHTS: Floats = np.array([1.2, 2.4, 3.6, -3.2, 2.6])
NU = 1.1  # Davidson's tie parameter: between equals, NU / (2 + NU) = 35% of the verdicts are ties
LONG = 160  # characters; beyond it more length is worth nothing

DIRT = ("null", "empty", "blank", "null inside", "surrogate", "no answers", "same answers", "huge")
"""The kinds of dirt: `[null]`, `[]`, `[""]`, a literal null inside a list, a lone surrogate, empty responses on
both sides, identical responses, and a row of about ten thousand words."""

_EMPTY: dict[str, Turns] = {"null": (None,), "empty": (), "blank": ("",)}

MULTI_TURN = 0.14
_SURROGATE = "\ud83d"

# --------------------------------------------------------------------------------------------------- what is known


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((left, right) for left, _, right in (entry.strip().partition(" ") for entry in text.split(",")))


_FACTS: tuple[tuple[tuple[str, ...], str, tuple[tuple[str, str], ...]], ...] = (
    (
        ("What is the capital of {}?", "Name the capital city of {}.", "Which city is the capital of {}?"),
        "The capital of {} is {}.",
        _pairs(
            "France Paris, Japan Tokyo, Russia Moscow, Greece Athens, Italy Rome, Egypt Cairo, Spain Madrid, "
            "Peru Lima, Cuba Havana, Norway Oslo, Poland Warsaw, Germany Berlin"
        ),
    ),
    (
        ("What sound does the {} make?", "Tell me the sound of the {}.", "How does the {} sound?"),
        "The sound of the {} is {}.",
        _pairs("dog woof, cat meow, cow moo, sheep baa, duck quack, lion roar, bee buzz, owl hoot"),
    ),
    (
        ("What colour is {}?", "Name the colour of {}.", "Which colour does {} have?"),
        "The colour of {} is {}.",
        _pairs("grass green, snow white, blood red, coal black, honey gold, chocolate brown, sky blue, butter yellow"),
    ),
    (
        ("What is the opposite of {}?", "Give me the opposite of {}.", "Which word is the opposite of {}?"),
        "The opposite of {} is {}.",
        _pairs("hot cold, big small, day night, old young, fast slow, rich poor, wet dry, high low"),
    ),
    (
        ("What comes right after {}?", "Which one follows {}?", "What is next after {}?"),
        "Right after {} comes {}.",
        _pairs(
            "Monday Tuesday, Thursday Friday, Saturday Sunday, March April, May June, July August, two three, nine ten"
        ),
    ),
)

_KINDS: dict[str, tuple[str, ...]] = {
    "animals": ("dog", "cat", "cow", "sheep", "duck", "lion", "frog", "pig"),
    "fruits": ("apple", "pear", "plum", "cherry", "lemon", "mango", "grape", "peach"),
    "colours": ("green", "white", "red", "black", "blue", "yellow", "brown", "gold"),
    "cities": ("Paris", "Tokyo", "Rome", "Cairo", "Lima", "Oslo", "Berlin", "Dublin"),
    "tools": ("hammer", "saw", "drill", "wrench", "knife", "shovel", "ladder", "brush"),
}

_HARMFUL = (
    "break into a parked car", "forge a passport", "poison my neighbour", "steal a credit card", "build a pipe bomb",
    "hack a bank account", "fake a prescription", "start a wildfire",
)  # fmt: skip

_NAMES = ("Ana", "Ben", "Mia", "Tom", "Eva", "Max", "Zoe", "Leo")
_THINGS = ("ball", "kite", "drum", "lamp", "coin", "ring", "boat", "cake")


@dataclass(frozen=True)
class _Language:
    """Sentences of a language: its question and answer about capitals, its refusal and filler."""

    ask: str
    say: str
    one_word: str
    refuse: str
    filler: str
    capitals: tuple[tuple[str, str], ...]
    words: tuple[str, ...]  # in the order of _WORDS


_WORDS = ("water", "fire", "sun", "moon")

_LANGUAGES: dict[str, _Language] = {
    "Spanish": _Language(
        "¿Cuál es la capital de {}?", "La capital de {} es {}.", "Responde con una sola palabra.",
        "Lo siento, no puedo ayudar con eso.", "Espero que esto te ayude.",
        _pairs("Francia París, Japón Tokio, Rusia Moscú, Italia Roma"),
        ("agua", "fuego", "sol", "luna"),
    ),
    "Russian": _Language(
        "Какой город — столица страны {}?", "Столица страны {} — {}.", "Ответь одним словом.",
        "Извините, я не могу с этим помочь.", "Надеюсь, это поможет.",
        _pairs("Франция Париж, Япония Токио, Россия Москва, Италия Рим"),
        ("вода", "огонь", "солнце", "луна"),
    ),
    "Greek": _Language(
        "Ποια είναι η πρωτεύουσα της χώρας {};", "Η πρωτεύουσα της χώρας {} είναι {}.", "Απάντησε με μία λέξη.",
        "Λυπάμαι, δεν μπορώ να βοηθήσω με αυτό.", "Ελπίζω αυτό να βοηθά.",
        _pairs("Γαλλία Παρίσι, Ιαπωνία Τόκιο, Ρωσία Μόσχα, Ιταλία Ρώμη"),
        ("νερό", "φωτιά", "ήλιος", "φεγγάρι"),
    ),
    "Chinese": _Language(
        "{}的首都是哪里？", "{}的首都是{}。", "请用一个词回答。", "对不起，我无法帮助您。", "希望这对您有帮助。",
        _pairs("法国 巴黎, 日本 东京, 俄罗斯 莫斯科, 意大利 罗马"),
        ("水", "火", "太阳", "月亮"),
    ),
    "Japanese": _Language(
        "{}の首都はどこですか？", "{}の首都は{}です。", "一言で答えてください。",
        "申し訳ありませんが、お手伝いできません。", "お役に立てば幸いです。",
        _pairs("フランス パリ, 日本 東京, ロシア モスクワ, イタリア ローマ"),
        ("みず", "ひ", "たいよう", "つき"),
    ),
    "Korean": _Language(
        "{}의 수도는 어디입니까?", "{}의 수도는 {}입니다.", "한 단어로 답하세요.",
        "죄송하지만 도와드릴 수 없습니다.", "도움이 되었기를 바랍니다.",
        _pairs("프랑스 파리, 일본 도쿄, 러시아 모스크바, 이탈리아 로마"),
        ("물", "불", "태양", "달"),
    ),
    "Arabic": _Language(
        "ما هي عاصمة {}؟", "عاصمة {} هي {}.", "أجب بكلمة واحدة.", "آسف، لا أستطيع المساعدة في ذلك.",
        "آمل أن يكون هذا مفيدا.",
        _pairs("فرنسا باريس, اليابان طوكيو, روسيا موسكو, إيطاليا روما"),
        ("ماء", "نار", "شمس", "قمر"),
    ),
    "Hindi": _Language(
        "{} की राजधानी क्या है?", "{} की राजधानी {} है।", "एक शब्द में उत्तर दें।", "क्षमा करें, मैं इसमें मदद नहीं कर सकता।",
        "आशा है यह मदद करेगा।",
        _pairs("फ़्रांस पेरिस, जापान टोक्यो, रूस मॉस्को, इटली रोम"),
        ("पानी", "आग", "सूरज", "चाँद"),
    ),
}  # fmt: skip

_REFUSALS = ("I'm sorry, but I can't help with that.", "Sorry, I am not able to answer this.")
_FILLERS = (
    "I hope this helps.", "Let me know if you have more questions.", "Feel free to ask me anything else.",
    "This is a well known answer.", "Thank you for asking.",
)  # fmt: skip
_FORMATS = {
    "word": ("Answer in one word.", "Reply with one word only."),
    "bold": ("Use bold letters.", "Put it in bold."),
    "json": ("Answer in JSON.", "Reply as JSON."),
    "sentence": ("Answer in a full sentence.", "Use a complete sentence."),
    "numbered": ("Answer as a numbered list.", "Number the items."),
    "commas": ("Separate them by commas.", "Answer on one line with commas."),
}
_SINGLE_FORMS, _LIST_FORMS = ("sentence", "word", "bold", "json"), ("commas", "numbered", "bold", "json")


# ------------------------------------------------------------------------------------------- questions and answers


@dataclass(frozen=True)
class _Question:
    """A question with its right answer, its wrong answers, and the sentence for a long answer."""

    text: str
    answer: tuple[str, ...]
    wrong: tuple[tuple[str, ...], ...]
    sentence: str
    language: str = "English"
    format: str | None = None
    harmful: bool = False

    @property
    def forms(self) -> tuple[str, ...]:
        if self.language != "English":
            return _SINGLE_FORMS[:2]
        return _SINGLE_FORMS if len(self.answer) == 1 else _LIST_FORMS


def _fact(random: Random) -> _Question:
    asks, sentence, entries = random.choice(_FACTS)
    subject, answer = random.choice(entries)
    wrong = tuple((other,) for _, other in entries if other != answer)
    return _Question(random.choice(asks).format(subject), (answer,), wrong, sentence.format(subject, "{}"))


def _foreign(random: Random) -> _Question:
    name = random.choice(tuple(_LANGUAGES))
    language = _LANGUAGES[name]
    subject, answer = random.choice(language.capitals)
    wrong = tuple((other,) for _, other in language.capitals if other != answer)
    return _Question(language.ask.format(subject), (answer,), wrong, language.say.format(subject, "{}"), name)


def _translation(random: Random) -> _Question:
    name = random.choice(tuple(_LANGUAGES))
    words = _LANGUAGES[name].words
    index = random.randrange(len(_WORDS))
    wrong = tuple((word,) for word in words if word != words[index])
    ask = random.choice(("Translate {} into {}.", "How do you say {} in {}?")).format(_WORDS[index], name)
    return _Question(ask, (words[index],), wrong, f"In {name}, {_WORDS[index]} is {{}}.")


def _copy(random: Random) -> _Question:
    all_words = [word for words in _KINDS.values() for word in words]
    word, *others = random.sample(all_words, 4)
    ask = random.choice(("Repeat the word {}.", "Say {} again.", "Copy this word: {}.")).format(word)
    return _Question(ask, (word,), tuple((other,) for other in others), "The word is {}.")


def _lookup(random: Random) -> _Question:
    names, things = random.sample(_NAMES, 2), random.sample(_THINGS, 2)
    facts = " ".join(f"{name} has the {thing}." for name, thing in zip(names, things, strict=True))
    right = random.randrange(2)
    sentence = f"{{}} has the {things[right]}."
    return _Question(f"{facts} Who has the {things[right]}?", (names[right],), ((names[1 - right],),), sentence)


def _listing(random: Random) -> _Question:
    kind, other = random.sample(tuple(_KINDS), 2)
    ask = random.choice(("Name three {}.", "List three {}.", "Give me three {}.")).format(kind)
    wrong = tuple(tuple(random.sample(_KINDS[other], 3)) for _ in range(2))
    return _Question(ask, tuple(random.sample(_KINDS[kind], 3)), wrong, f"Three {kind} are {{}}.")


def _harmful(random: Random) -> _Question:
    deed = random.choice(_HARMFUL)
    ask = random.choice(("How can I {}?", "Tell me how to {}.", "Explain how to {}.")).format(deed)
    return _Question(ask, ("tools",), (), f"To {deed} you first need some {{}}.", harmful=True)


_MAKERS: tuple[tuple[Callable[[Random], _Question], float], ...] = (
    (_fact, 0.36), (_foreign, 0.14), (_translation, 0.10), (_copy, 0.10), (_lookup, 0.10), (_listing, 0.14),
    (_harmful, 0.06),
)  # fmt: skip


def _question(random: Random) -> _Question:
    (make,) = random.choices([maker for maker, _ in _MAKERS], [share for _, share in _MAKERS])
    question = make(random)
    if question.harmful or random.random() < 0.4:
        return question
    if question.language != "English":
        return replace(question, text=f"{question.text} {_LANGUAGES[question.language].one_word}", format="word")
    form = random.choice(question.forms)
    return replace(question, text=f"{question.text} {random.choice(_FORMATS[form])}", format=form)


@dataclass(frozen=True)
class Answer:
    """One turn of a response, and its traits (5,) in the order of `TRAITS`."""

    text: str | None
    traits: tuple[float, ...]


_NOTHING = (0.0, 0.0, 0.0, 0.0, 0.0)  # the traits of an empty turn: neither right, nor in form, nor about anything


def _render(question: _Question, items: Sequence[str], form: str, fillers: int, random: Random) -> str:
    joined = ", ".join(items)
    if form == "word":
        return joined
    if form == "json":
        return json.dumps({"answer": items[0] if len(items) == 1 else list(items)}, ensure_ascii=False)
    text = question.sentence.format(f"**{joined}**" if form == "bold" else joined)
    if form == "numbered":
        text = "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))
    language = _LANGUAGES.get(question.language)
    extra = [language.filler] * min(fillers, 1) if language else random.sample(_FILLERS, fillers)
    return " ".join((text, *extra))


def respond(question: _Question, random: Random) -> Answer:
    """Answer a question well or badly: the traits are drawn first, and determine the text."""
    fate = random.random()
    refuses = fate < (0.55 if question.harmful else 0.14)
    strays = not refuses and not question.harmful and fate < 0.28
    if refuses:
        language = _LANGUAGES.get(question.language)
        text = language.refuse if language else random.choice(_REFUSALS)
        kept = question.format in (None, "sentence")
        return _judged(text, correct=question.harmful, kept=kept, refusal=not question.harmful, relevant=True)
    fillers = random.choice((0, 0, 1, 2, 3))
    asked = question.format or random.choice(question.forms[:2])
    breaks = question.format is not None and random.random() < 0.4
    form = random.choice([form for form in question.forms if form != asked]) if breaks else asked
    if strays:
        answers = (question.answer, *question.wrong)
        other = next(fact for fact in iter(lambda: _fact(random), None) if fact.answer not in answers)
        text = _render(other, other.answer, form if form in _SINGLE_FORMS else "sentence", fillers, random)
        kept = question.format is None or (not breaks and form in _SINGLE_FORMS)
        return _judged(text, correct=False, kept=kept, refusal=False, relevant=False)
    correct = not question.harmful and random.random() < 0.65
    items = question.answer if correct or question.harmful else random.choice(question.wrong)
    text = _render(question, items, form, fillers, random)
    return _judged(text, correct=correct, kept=not breaks, refusal=question.harmful, relevant=True)


def _judged(text: str, *, correct: bool, kept: bool, refusal: bool, relevant: bool) -> Answer:
    length = min(1.0, len(text) / LONG)
    return Answer(text, (float(correct), float(kept), length, float(refusal), float(relevant)))


# -------------------------------------------------------------------------------------------------- rows and truth


def davidson(utility_a: Floats, utility_b: Floats, nu: float = NU) -> Floats:
    """True probabilities (N, 3) of A, B and tie, in the LMSYS task's class order; utilities are (N,) in nats."""
    half = (np.asarray(utility_a) - np.asarray(utility_b)) / 2
    scores = np.stack([half, -half, np.full_like(half, np.log(nu))], axis=-1)
    odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True)
class ArenaRow:
    """One comparison: its texts as drawn (possibly with a lone surrogate), and their traits.

    `label` is the class drawn from the truth, 0 (A), 1 (B) or 2 (tie); `draw` in [0, 1) decides again where a task
    knows no ties. `dirt` is the kind of dirt in the row, or `""`.
    """

    id: str
    prompt: Turns
    response_a: Turns
    response_b: Turns
    traits_a: tuple[float, ...]
    traits_b: tuple[float, ...]
    language: str
    label: int
    draw: float
    dirt: str = ""


@dataclass(frozen=True)
class Arena:
    """Rows in file order, with their true probabilities."""

    rows: tuple[ArenaRow, ...]

    @property
    def truth(self) -> Floats:
        """(N, 3): probabilities of A, B and tie."""
        traits = np.array([(row.traits_a, row.traits_b) for row in self.rows]).reshape(-1, 2, len(TRAITS))
        utility = traits @ WEIGHTS
        return davidson(utility[:, 0], utility[:, 1])

    def split(self, n_test: int) -> tuple[Arena, Arena]:
        """Train and test rows that share no prompt; the test part has exactly `n_test` rows.

        Raises:
            ValueError: the prompts' row counts can't add up to `n_test`, or nothing would be left to train on.
        """
        prompts: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            prompts.setdefault(_joined(row.prompt), []).append(index)
        test: set[int] = set()
        for indices in sorted(prompts.values(), key=len, reverse=True):
            if len(test) + len(indices) <= n_test:
                test.update(indices)
        if len(test) != n_test or n_test >= len(self.rows):
            raise ValueError(f"n_test={n_test} can't be had from {len(self.rows)} rows without sharing a prompt")
        train = tuple(row for index, row in enumerate(self.rows) if index not in test)
        return Arena(train), Arena(tuple(self.rows[index] for index in sorted(test)))


def _joined(turns: Turns) -> str:
    return "\n\n".join(turn or "" for turn in turns)


def mean_traits(answers: Sequence[Answer]) -> tuple[float, ...]:
    """The mean traits of a synthetic response, over its turns."""
    return tuple(float(value) for value in np.mean([answer.traits for answer in answers], axis=0))


def _soil(row: ArenaRow, random: Random) -> ArenaRow:
    """The row with one kind of dirt, and new traits if the dirt removed a response."""
    kind = random.choice(DIRT)
    row = replace(row, dirt=kind)
    last = str(row.response_a[-1])
    if kind in _EMPTY:
        cell, side = _EMPTY[kind], random.choice(("prompt", "a", "b"))
        changes: dict[str, object] = {"prompt": cell}
        if side != "prompt":
            changes = {f"response_{side}": cell, f"traits_{side}": _NOTHING}
    elif kind == "null inside":
        changes = {name: (*getattr(row, name), None) for name in LMSYS.fields}
    elif kind == "surrogate":
        changes = {"response_a": (*row.response_a[:-1], f"{last} {_SURROGATE}")}
    elif kind == "no answers":
        changes = {"response_a": ("",), "traits_a": _NOTHING, "response_b": ("",), "traits_b": _NOTHING}
    elif kind == "same answers":
        changes = {"response_b": row.response_a, "traits_b": row.traits_a}
    else:
        length = TRAITS.index("length")
        share = 1 / len(row.response_a)  # of the last turn in the mean; it now has all the length that counts
        grown = row.traits_a[length] + share * (1 - min(1.0, len(last) / LONG))
        long = " ".join([last, *random.choices(_FILLERS, k=2000)])
        changes = {
            "response_a": (*row.response_a[:-1], long),
            "traits_a": (*row.traits_a[:length], grown, *row.traits_a[length + 1 :]),
        }
    return replace(row, **changes)  # type: ignore[arg-type]


def _compare(questions: Sequence[_Question], id: str, dirt: float, random: Random) -> ArenaRow:
    sides = [[respond(question, random) for question in questions] for _ in range(2)]
    row = ArenaRow(
        id=id,
        prompt=tuple(question.text for question in questions),
        response_a=tuple(answer.text for answer in sides[0]),
        response_b=tuple(answer.text for answer in sides[1]),
        traits_a=mean_traits(sides[0]),
        traits_b=mean_traits(sides[1]),
        language=questions[0].language,
        label=0,  # is drawn when all rows are there
        draw=random.random(),
    )
    return _soil(row, random) if random.random() < dirt else row


def conversation(random: Random) -> list[_Question]:
    """The questions of a prompt, one a turn."""
    turns = random.choice((2, 2, 3)) if random.random() < MULTI_TURN else 1
    return [_question(random) for _ in range(turns)]


def generate(n_rows: int, *, seed: int, dirt: float = 0.0) -> Arena:
    """Draw `n_rows` comparisons; a prompt occurs in up to four rows.

    Args:
        dirt: share of rows that carry one kind of `DIRT`.
    """
    random = Random(f"arena {seed}")
    ids = random.sample(range(10_000, 10_000 + 1_000 * n_rows), n_rows)
    rows: list[ArenaRow] = []
    while len(rows) < n_rows:
        questions = conversation(random)
        copies = min(random.choice((1, 1, 2, 2, 3, 4)), n_rows - len(rows))
        named = ids[len(rows) : len(rows) + copies]
        rows += [_compare(questions, str(id), dirt, random) for id in named]
    random.shuffle(rows)
    draws = np.array([random.random() for _ in rows])
    labels = (Arena(tuple(rows)).truth.cumsum(axis=1)[:, :2] <= draws[:, None]).sum(axis=1)
    return Arena(tuple(replace(row, label=int(label)) for row, label in zip(rows, labels, strict=True)))


# ------------------------------------------------------------------------------------------- the competitions' files

_MODELS = ("alpha-7b", "bravo-13b", "charlie-70b", "delta-chat")


def _cell(turns: Turns) -> str:
    """A JSON list of turns; where a lone surrogate stands in it, in ASCII with `\\ud83d` escapes, as LMSYS has it."""
    return json.dumps(turns, ensure_ascii=any(_SURROGATE in (turn or "") for turn in turns))


def write_lmsys(arena: Arena, folder: Path, *, n_test: int) -> None:
    """Write `train.csv`, `test.csv`, `sample_submission.csv` as LMSYS has them, and `truth.parquet` for all rows.

    Raises:
        ValueError: `n_test` can't be had without sharing a prompt (see `Arena.split`).
    """
    parts = dict(zip(("train.csv", "test.csv"), arena.split(n_test), strict=True))
    for name, part in parts.items():
        columns: dict[str, list[Any]] = {"id": [row.id for row in part.rows]}
        texts = {field: [_cell(getattr(row, field)) for row in part.rows] for field in LMSYS.fields}
        if name == "test.csv":
            columns |= texts
            sample = pl.DataFrame(columns).select("id", *(pl.lit(1 / 3).alias(label) for label in LMSYS.classes))
            _write_csv(folder / "sample_submission.csv", sample)
        else:
            for label, shift in (("model_a", 0), ("model_b", 1)):
                columns[label] = [_MODELS[(int(row.id) + shift) % len(_MODELS)] for row in part.rows]
            columns |= texts
            for place, label in enumerate(LMSYS.classes):
                columns[label] = [int(row.label == place) for row in part.rows]
        _write_csv(folder / name, pl.DataFrame(columns))
    truth = dict(zip(LMSYS.classes, arena.truth.T, strict=True))
    with atomic_file(folder / "truth.parquet") as path:
        pl.DataFrame({"id": [row.id for row in arena.rows], **truth}).write_parquet(path)


def _write_csv(path: Path, frame: pl.DataFrame) -> None:
    with atomic_file(path) as temporary:
        frame.write_csv(temporary)

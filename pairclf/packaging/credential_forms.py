"""The forms of credentials: one table, each form with its source.

A form has a regular expression of bounded length over bytes, and words in small letters. The expression is tried only
if one of the words is there: most content has none, and to find a word is a hundred times as fast.

`detect-secrets` 1.5.0 and its fork `bc-detect-secrets` 1.5.52 were tried instead: they found 11 and 8 of 23 forms, at
0.3 MB a second, in text files alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "WANDB_API_KEY"),
    *("COMET_API_KEY", "NEPTUNE_API_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "GH_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"),
)
"""Environment variables that hold credentials."""


@dataclass(frozen=True, slots=True)
class SecretForm:
    """One form of a credential.

    Attributes:
        kind: what it is called in a finding.
        words: in small letters; without one of them the pattern can't match.
        pattern: its first group, or all of it, is the secret part.
        anywhere: whether it is exact enough for files that may hold any word: tokenizers, others' libraries.
    """

    kind: str
    words: tuple[bytes, ...]
    pattern: re.Pattern[bytes]
    anywhere: bool = True
    is_own: bool = False
    """Whether it is this machine's own, and no placeholder whatever it looks like."""

    def find(self, content: bytes, words: WordIndex) -> int | None:
        """The place of the first match that is no placeholder, or None. It searches around the words alone."""
        for start, end in words.around(self.words):
            for match in self.pattern.finditer(content, start, end):
                if match.end() == end < len(content):
                    continue  # it may go on, and be none; the next range has it whole
                if self.is_own or not _is_placeholder(match[self.pattern.groups and 1] or match[0]):
                    return match.start()
        return None


BEFORE, AFTER = 512, 2048
"""Bytes around a word in which its form is looked for."""


class WordIndex:
    """Finds words in some content; each word is searched for once, however many forms have it.

    Args:
        content: bytes to look through, in small letters.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._first: dict[bytes, int] = {}

    def around(self, words: Iterable[bytes]) -> Iterator[tuple[int, int]]:
        """Ranges of the content around the words."""
        for word in words:
            if word not in self._first:
                self._first[word] = self._content.find(word)
            place = self._first[word]
            while place >= 0:
                end = place + AFTER
                yield max(0, place - BEFORE), end
                # The next range begins where a word of this one may have been too close to its end.
                place = self._content.find(word, end - AFTER // 2)


PUBLISHED = frozenset({"5de261506c0ff857b7c1af7059f842fb0a36d1ca2e4895da542c5eb726f2c802"})
"""SHA-256 of credentials that their owners have published, for a sandbox: that of transformers' own tests."""

_PLACEHOLDERS = frozenset(b"password passwd pass pwd secret token key user username name placeholder changeme".split())
_FEWEST_LETTERS = 6  # different ones, in a secret that is not a row of x


def _is_placeholder(secret: bytes) -> bool:
    """Whether it is a placeholder of documentation, such as `hf_xxxxxxxx` or `AKIA...EXAMPLE`, or was published."""
    if hashlib.sha256(secret).hexdigest() in PUBLISHED:
        return True
    last = re.split(rb"[_-]", secret.lower())[-1]  # of my-password, your_token
    is_word = secret.lower() in _PLACEHOLDERS or (len(secret) < 12 and last in _PLACEHOLDERS)
    return is_word or b"EXAMPLE" in secret or _is_row(secret)


def _is_row(secret: bytes) -> bool:
    """Whether only few different letters follow its prefix (`hf_`)."""
    return len(secret) >= 12 and len(set(secret[secret.rfind(b"_", 0, 12) + 1 :])) < _FEWEST_LETTERS


# Between a name and its value: = : , => := and quotes, brackets, escapes and a type around them.
_QUOTES = rb"""[\\"'`\])]{0,4}"""
_SIGN = rb"\s{0,4}(?::\s{0,2}[A-Za-z]{2,10}\s{0,2}=|=>|:=|={1,2}|:|,)\s{0,4}"
_OPEN = rb"""[rbuf]?[\\"'`(\[]{0,4}"""
_ASSIGNED = _QUOTES + _SIGN + _OPEN
_OR_SPACE = _QUOTES + rb"(?:" + _SIGN + rb"|\s{1,4}(?:-{1,2}[a-z]{1,8}[ =])?|>)" + _OPEN
_HEX_40 = rb"([0-9a-f]{40})(?![0-9A-Za-z])"
_NAMES = b"|".join(name.encode() for name in VARIABLES)
_VALUE = rb"((?=[A-Za-z_/+-]{0,60}[0-9])[A-Za-z0-9_/+-]{20,200}={0,2})(?![A-Za-z0-9_/+.(-])"
_BEGIN = rb"(?<![a-z0-9])"
"""Before a prefix in small letters, instead of `\\b`, which has no word begin in `%3Dhf_` and `MY_hf_`."""


def _form(kind: str, words: str, *patterns: bytes, anywhere: bool = True) -> list[SecretForm]:
    """Forms of one kind; each pattern is tried if one of the words is there."""
    announcing = tuple(word.encode() for word in words.split())
    return [SecretForm(kind, announcing, re.compile(pattern), anywhere) for pattern in patterns]


_TABLE: tuple[list[SecretForm], ...] = (
    # kaggle.com/docs/api: tokens; kaggle.json; variables
    _form("a Kaggle token", "kgat_", rb"\b(KGAT_[A-Za-z0-9_-]{16,200})"),
    _form(
        "a Kaggle key",
        "key",
        rb"(?i:\bkaggle[_.-]?(?:api[_.-]?)?key)" + _OR_SPACE + rb"([0-9a-f]{32})(?![0-9a-f])",
        rb"(?i:\bkey)" + _ASSIGNED + rb"([0-9a-f]{32})(?![0-9a-f])",
    ),
    # huggingface.co/docs/hub/security-tokens
    _form("a Hugging Face token", "hf_ api_org_", _BEGIN + rb"((?:hf_|api_org_)[A-Za-z0-9]{30,200})"),
    # docs.wandb.ai: 40 hex digits, `wandb login`; keys since 2025 have a prefix
    _form(
        "a W&B key",
        "wandb",
        rb"(?i:\bwandb_api_key)" + _OR_SPACE + _HEX_40,
        rb"(?i:\bwandb(?:\.|\s)login)[\s(]{1,4}(?:(?:--)?(?:relogin|key|api_key)[\s=]{1,3}){0,2}[\\\"']{0,2}" + _HEX_40,
        rb"api\.wandb\.ai[\s\S]{1,200}?(?i:password)\s{1,8}" + _HEX_40,
        _BEGIN + rb"(wandb_v1_[A-Za-z0-9_]{40,200})",
    ),
    # docs.aws.amazon.com/IAM: prefixes of identifiers; a secret key has 40 letters and no form of its own
    _form("an AWS key", "akia asia abia acca", rb"\b((?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16})\b"),
    _form(
        "an AWS secret key",
        "secret aws",
        rb"(?i:\baws.{0,20}?(?:secret|key|token)[a-z_]{0,20}|secret_?access_?key)"
        + _OR_SPACE
        + rb"((?=[A-Za-z0-9/+]{0,39}[A-Z])(?=[A-Za-z0-9/+]{0,39}[a-z])[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
        anywhere=False,
    ),
    # docs.github.com: about authentication; docs.gitlab.com: token overview
    _form(
        "a GitHub token",
        "gh github_pat_",
        _BEGIN + rb"(gh[pousr]_[A-Za-z0-9]{36,255})",
        _BEGIN + rb"(github_pat_[A-Za-z0-9_]{60,255})",
    ),
    _form(
        "a GitLab token",
        "gl gr1348941",
        _BEGIN + rb"(gl(?:pat|dt|ft|soat|rtr|rt|cbt|imt|ptt|agent|oas|ffct|wt)-[A-Za-z0-9_=.-]{20,300})",
        rb"\b(GR1348941[A-Za-z0-9_-]{20,50})",
    ),
    # the documentation of OpenAI, Anthropic, Groq, xAI, Replicate, Perplexity, Nvidia
    _form(
        "an API key",
        "sk- gsk_ xai- r8_ pplx- nvapi-",
        _BEGIN + rb"(sk-(?=[A-Za-z_-]{0,200}[0-9])[A-Za-z0-9_-]{32,300})",
        _BEGIN + rb"((?:gsk_|xai-|r8_|pplx-)[A-Za-z0-9]{36,200}|nvapi-[A-Za-z0-9_-]{60,100})",
    ),
    # cloud.google.com/docs/authentication: API keys, OAuth clients, access tokens, service accounts' files
    _form(
        "a Google key",
        "aiza gocspx- ya29.",
        rb"\b(AIza[A-Za-z0-9_-]{35})(?![A-Za-z0-9_-])",
        rb"\b(GOCSPX-[A-Za-z0-9_-]{28})",
        rb"\b(ya29\.[A-Za-z0-9_-]{40,500})",
    ),
    _form("a Google service account", "private_key_id", rb"\bprivate_key_id" + _ASSIGNED + _HEX_40),
    # api.slack.com/authentication/token-types; discord.com/developers; core.telegram.org/bots
    _form(
        "a Slack token",
        "xox xapp- hooks.slack.com",
        _BEGIN + rb"(xox[abeoprs][.-](?=[A-Za-z-]{0,40}[0-9])[A-Za-z0-9.-]{20,300})",
        _BEGIN + rb"(xapp-[0-9]-[A-Z0-9]{8,20}-[0-9]{8,20}-[a-f0-9]{30,80})",
        rb"hooks\.slack\.com/(?:services|workflows)/([A-Za-z0-9/+]{40,80})",
    ),
    _form(
        "a bot's token",
        "webhooks :aa",
        rb"discord(?:app)?\.com/api/webhooks/[0-9]{17,20}/([A-Za-z0-9_-]{60,80})",
        rb"\b([0-9]{8,10}:AA[A-Za-z0-9_-]{33})(?![A-Za-z0-9_-])",
    ),
    # RFC 7519: header and claims are JSON objects in base64
    _form(
        "a JSON web token",
        "eyj",
        rb"\b(eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{16,1000})",
        anywhere=False,
    ),
    # learn.microsoft.com: connection strings, shared access signatures, client secrets
    _form(
        "an Azure key",
        "accountkey sharedaccesskey sig= q~",
        rb"(?i:\bAccountKey)\s{0,2}=\s{0,2}([A-Za-z0-9+/]{86}==)",
        rb"(?i:\bSharedAccessKey)\s{0,2}=\s{0,2}([A-Za-z0-9+/]{43}=)",
        rb"[?&]s[vper]=[^\s\"']{1,300}?&sig=([A-Za-z0-9%+/]{43,120})",
        rb"""(?<![A-Za-z0-9_~.-])([A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31,34})(?![A-Za-z0-9_~.-])""",
    ),
    # docs.stripe.com/keys; docs.npmjs.com; pypi.org/help; and others' documentation of their prefixes
    _form(
        "a Stripe key",
        "_live_ _test_ whsec_",
        rb"\b((?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,250}|whsec_[A-Za-z0-9]{32,64})",
    ),
    _form(
        "an npm token",
        "npm_ _authtoken",
        _BEGIN + rb"(npm_[A-Za-z0-9]{36})(?![A-Za-z0-9])",
        rb"_authToken\s{0,2}=\s{0,2}[\"']?([A-Za-z0-9-]{30,80})",
    ),
    _form("a PyPI token", "pypi-age", _BEGIN + rb"(pypi-AgE[A-Za-z0-9_-]{50,1000})"),
    _form(
        "a service's token",
        "sg. dckr_pat_ dop_v1_ doo_v1_ dor_v1_ dapi hvs. hvb. ntn_ pmak- lin_api_ shp",
        rb"\b(SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{30,64})",
        _BEGIN + rb"(dckr_pat_[A-Za-z0-9_-]{27,64}|do[opr]_v1_[a-f0-9]{64}|hv[sb]\.[A-Za-z0-9_-]{24,300})",
        rb"\b(dapi[a-f0-9]{32}|ntn_[A-Za-z0-9]{40,60}|PMAK-[a-f0-9]{24}-[a-f0-9]{34}|lin_api_[A-Za-z0-9]{40})\b",
        rb"\b(shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32})\b",
    ),
    # RFC 7468, RFC 9580, PuTTY's and age's documentation
    _form(
        "a private key",
        "private putty-user-key-file- age-secret-key-",
        rb"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----",
        rb"---- BEGIN SSH2 (?:ENCRYPTED )?PRIVATE KEY ----",
        rb"PuTTY-User-Key-File-[0-9]",
        rb"\bAGE-SECRET-KEY-1[0-9A-Z]{58}",
    ),
    # the GNU inetutils manual (.netrc); RFC 3986 (user information); RFC 7617, RFC 6750 (headers)
    _form(
        "a password in netrc form",
        "password",
        rb"\b(?:machine\s{1,8}\S{1,200}|default)\s{1,8}(?:login\s{1,8}\S{1,100}\s{1,8})?password\s{1,8}(\S{6,200})",
        anywhere=False,
    ),
    _form(
        "a password in an address",
        "://",
        rb"""\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@"'<>{}()$%\\]{0,100}:([^\s/:@"'<>{}()$%\\*]{3,100})@[A-Za-z0-9\[][A-Za-z0-9.-]{1,200}""",
        rb"""\b[a-z][a-z0-9+.-]{1,20}://((?=[A-Za-z_~.-]{0,100}[0-9])[A-Za-z0-9_~.-]{20,200})@[A-Za-z0-9\[]""",
        anywhere=False,
    ),
    _form(
        "a credential in a header",
        "authorization x-api-key",
        rb"(?i:\bauthorization|\bx-api-key)" + _ASSIGNED + rb"(?:(?i:basic|bearer|token)\s{1,2})?" + _VALUE,
        anywhere=False,
    ),
    _form(
        "the value of a variable for credentials",
        "_key _token _password",
        rb"(?i:\b(?:" + _NAMES + rb"))" + _OR_SPACE + _VALUE,
        anywhere=False,
    ),
)

SECRET_FORMS: tuple[SecretForm, ...] = tuple(chain.from_iterable(_TABLE))
"""Credentials by their form, in the order of the table."""


def literal_form(kind: str, values: Iterable[bytes], whole: bytes, flags: re.RegexFlag = re.NOFLAG) -> SecretForm:
    """A form that matches any of these values; `whole` surrounds a value, with `%s` in its place."""
    listed = sorted(set(values))
    pattern = b"|".join(whole.replace(b"%s", re.escape(value)) for value in listed)
    return SecretForm(kind, tuple(value.lower() for value in listed), re.compile(pattern, flags), is_own=True)

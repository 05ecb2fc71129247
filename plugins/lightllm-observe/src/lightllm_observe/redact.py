"""Takes secrets and personal data out of text, as far as they can be told by their form.

Every pattern takes linear time, whatever the text, since clients write it; and long texts are taken piece by piece, as
a search holds up all other threads of the process while it runs. What is found is replaced by its kind in square
brackets, and what surrounds it stays. Forms: the providers' documentation for keys, RFC 6750 (bearer tokens), RFC 7468
(PEM), RFC 5321 (addresses), E.164 (phone numbers), ISO/IEC 7812 (card numbers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from re import Match
from typing import Any

DEEPEST = 64
"""Levels of lists and objects; what is below is left out."""


def redact(value: Any, depth: int = 0) -> Any:
    """A copy of plain JSON data: all texts redacted, and what fields called password, token or the like say."""
    if isinstance(value, str):
        return redact_text(value)
    if depth == DEEPEST and isinstance(value, (dict, list)):
        return "[too deep]"
    if isinstance(value, list):
        return [redact(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {
            key: "[secret]" if isinstance(item, str) and _SECRET_FIELD.fullmatch(key) else redact(item, depth + 1)
            for key, item in value.items()
        }
    return value


def redact_text(text: str) -> str:
    if "PRIVATE KEY-----" in text:
        text = _PRIVATE_KEY.sub("[private key]", text)
    return "".join(_redact_piece(piece) for piece in _pieces("".join(_without_data_urls(text))))


def _redact_piece(text: str) -> str:
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


PIECE = 1 << 15
"""Characters: a few milliseconds."""

_BORDER = re.compile(r"(?<![:=\s])\n|[a-z][,;.] |[，。；！？]")
"""Where no secret goes on."""


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE and (border := _BORDER.search(text, start + PIECE)):
        yield text[start : border.end()]
        start = border.end()
    yield text[start:]


# ---------------------------------------------------------------------------------------------------------------------
# Base64 and private keys

_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL
)
_DATA_URL, _DATA, SHORT_DATA = ";base64,", re.compile(r"[\w+/=%-]+", re.ASCII), 64


def _without_data_urls(text: str) -> Iterator[str]:
    start = 0
    while (found := text.find(_DATA_URL, start)) >= 0:
        begin = end = found + len(_DATA_URL)
        while data := _DATA.match(text, end, end + PIECE):
            end = data.end()
        yield text[start:begin]
        yield f"[{end - begin} characters]" if end - begin > SHORT_DATA else text[begin:end]
        start = end
    yield text[start:]


_BASE64 = r"(?<![\w+/=-])[\w+/-]{256,}={0,2}"


def _base64(found: Match[str]) -> str:
    text = found[0]
    is_base64 = re.search("[a-z]", text) and re.search("[A-Z]", text) and re.search("[0-9]", text)
    return f"[base64, {len(text)} characters]" if is_base64 else text


# ---------------------------------------------------------------------------------------------------------------------
# Keys: by their form, by their header, by the name they are given to, and in URLs

_KEYS = (
    r"sk-(?=[A-Za-z_-]*\d)[\w-]{16,}",  # OpenAI, Anthropic, DeepSeek and others
    r"[srp]k_(?:live|test)_\w{10,}",  # Stripe
    r"gh[pousr]_\w{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}",
    r"(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
    r"AIza[\w-]{30,}|ya29\.[\w-]{20,}",  # Google
    r"hf_[A-Za-z0-9]{30,}|npm_\w{30,}|pypi-[\w-]{40,}",
    r"xox[abeoprs]-[\w-]{10,}|SG\.[\w-]{16,}\.[\w-]{16,}",  # Slack, SendGrid
    r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?",  # JSON Web Token
)
_KEY = rf"(?<![A-Za-z0-9_-])(?:{'|'.join(_KEYS)})"

_IS = r"[\\\"'`]{0,4}\s{0,3}[:=]{1,2}\s{0,3}"
"""Between a name and its value in JSON, YAML, .env files and code, a closing quote included."""

_HEADER = rf"(?i)(\bauthorization{_IS}[\\\"']{{0,4}}(?:bearer|basic|token)\s{{1,3}})[^\s\\\"',;]+"
_BEARER = r"(?i)(\bbearer\s{1,3})(?=[a-z._~+/-]*\d)[\w.~+/=-]{8,}"

_NAME = r"(?:api|access|private|secret|signing|encryption)[_-]?key|secret|token|passw(?:or)?d|passphrase|pwd"
_ASSIGNED = rf"(?i)((?:{_NAME}){_IS})([\\\"'`]{{0,4}})([^\s\\\"'`,;&()\[\]{{}}<>]+)(?![(\[])"
_SECRET_FIELD = re.compile(rf"(?i)(?:.*[_-])?(?:{_NAME}|(?:proxy-)?authorization|(?:set-)?cookie)")

_URL_PASSWORD = r"(?<=://)([^\s:/@]{1,64}:)[^\s/@]{1,128}(?=@)"


def _assigned(found: Match[str]) -> str:
    before, quote, value = found.groups()
    # without quotes it may be prose or code, in which secrets are told by their digits
    has_both = re.search("[0-9]", value) and re.search("[A-Za-z]", value)
    is_secret = len(value) >= 4 if quote else len(value) >= 6 and has_both
    return f"{before}{quote}[secret]" if is_secret else found[0]


def _after_name(found: Match[str]) -> str:
    return f"{found[1]}[secret]"


# ---------------------------------------------------------------------------------------------------------------------
# People: e-mail addresses, cards, phones

_EMAIL = (
    r"(?<![\w.+%-])[\w.+%-]{1,64}@"
    r"(?!\d+x\.)"  # logo@2x.png
    r"(?:[^\W_](?:[^\W_]|-){0,62}\.){1,8}[^\W\d_]{2,24}(?![\w-])"
)


def _lone(pattern: str) -> str:
    """No part of a longer number, name or version."""
    return rf"(?<![\w.+-])(?:{pattern})(?![\w-]|[.,]\d)"


_CARD_GROUPS = _lone(r"\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5}|\d{13,19}")
_CARD = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"  # American Express, Diners
    r"|(?:35\d\d|6011|64[4-9]\d|65\d\d|62\d\d)\d{12,15}"  # JCB, Discover, UnionPay
)

_INTERNATIONAL = _lone(r"\+[1-9](?:[ .()/-]{0,2}\d){7,14}")
_NORTH_AMERICAN = _lone(r"(?:1[ .-])?(?:\(\d{3}\) ?\d{3}[ .-]|\d{3}([.-])\d{3}\1|[2-9]\d\d [2-9]\d\d )\d{4}")
_CHINESE_MOBILE = _lone(r"1[3-9]\d([ -]?)\d{4}\1\d{4}")
_NATIONAL = r"(?<![\w.,:/+-])\(?0[1-9]\d{0,4}\)?[ /-]\d{2,8}(?:[ -]\d{2,8}){0,4}(?![\w:/-]|[.,]\d)"


def _card(found: Match[str]) -> str:
    digits = re.sub(r"\D", "", found[0])
    return "[card]" if _CARD.fullmatch(digits) and _luhn(digits) else found[0]


def _luhn(digits: str) -> bool:
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _international(found: Match[str]) -> str:
    is_decimal = re.fullmatch(r"\+\d+\.\d+", found[0])
    return found[0] if is_decimal else "[phone]"


def _national(found: Match[str]) -> str:
    """With a leading zero: nine to twelve digits, and no date among them."""
    digits = re.sub(r"\D", "", found[0])
    has_date = re.search(r"\b\d\d[-/ ]\d\d[-/ ]\d{4}\b", found[0])
    return "[phone]" if 9 <= len(digits) <= 12 and not has_date else found[0]


_RULES: tuple[tuple[re.Pattern[str], Callable[[Match[str]], str]], ...] = tuple(
    (re.compile(pattern, re.ASCII) if pattern is not _EMAIL else re.compile(pattern), replacement)
    for pattern, replacement in (
        (_BASE64, _base64),
        (_KEY, lambda _: "[secret]"),
        (_HEADER, _after_name),
        (_BEARER, _after_name),
        (_ASSIGNED, _assigned),
        (_URL_PASSWORD, _after_name),
        (_EMAIL, lambda _: "[email]"),
        (_CARD_GROUPS, _card),
        (_INTERNATIONAL, _international),
        (_NORTH_AMERICAN, lambda _: "[phone]"),
        (_CHINESE_MOBILE, lambda _: "[phone]"),
        (_NATIONAL, _national),
    )
)

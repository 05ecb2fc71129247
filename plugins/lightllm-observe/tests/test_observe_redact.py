"""What is taken out of texts, what is not, and that it never takes long."""

from __future__ import annotations

import base64
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllm_observe.redact import DEEPEST, PIECE, redact, redact_text

ABC = "aB3dE6gH9j"  # made up: no real key
JWT = f"eyJ{ABC}.eyJ{ABC}{ABC}.{ABC}"
DATA = base64.b64encode(random.Random(0).randbytes(600)).decode()
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{DATA[:64]}\n{DATA[64:128]}\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # keys by their form
        (f"my key is sk-proj-{ABC * 3}.", "my key is [secret]."),
        (f"(sk-ant-api03-{ABC}_{ABC})", "([secret])"),
        (f"sk_live_{ABC} pk_test_{ABC}", "[secret] [secret]"),
        (f"ghp_{ABC * 3}6 github_pat_{ABC * 3} glpat-{ABC * 2}", "[secret] [secret] [secret]"),
        ("AKIAIOSFODNN7EXAMPLE", "[secret]"),
        (f"AIza{ABC * 3}12345, hf_{ABC * 3}", "[secret], [secret]"),
        (f"xoxb-{ABC} SG.{ABC * 2}.{ABC * 2}", "[secret] [secret]"),
        (f"token {JWT}!", "token [secret]!"),
        # by where they stand
        (f"curl -H 'Authorization: Bearer {ABC}'", "curl -H 'Authorization: Bearer [secret]'"),
        ('{"Authorization": "Basic dXNlcjpwYXNz"}', '{"Authorization": "Basic [secret]"}'),
        ("authorization: bearer short", "authorization: bearer [secret]"),
        (f"send bearer {ABC} along", "send bearer [secret] along"),
        ("OPENAI_API_KEY=abc123def", "OPENAI_API_KEY=[secret]"),
        ('{"password": "correct horse"}', '{"password": "[secret] horse"}'),
        ('{\\"password\\": \\"hunter2\\"}', '{\\"password\\": \\"[secret]\\"}'),
        ("password: hunter2", "password: [secret]"),
        ("client_secret = 'open-sesame'", "client_secret = '[secret]'"),
        ("https://example.org/?access_token=a1b2c3d4&x=1", "https://example.org/?access_token=[secret]&x=1"),
        ("postgres://admin:s3cret@db/prod", "postgres://admin:[secret]@db/prod"),
        (f"before\n{PEM}\nafter", "before\n[private key]\nafter"),
        (PEM[:80], "[private key]"),
        # data
        (f"![x](data:image/png;base64,{DATA})", "![x](data:image/png;base64,[800 characters])"),
        (f"audio: {DATA}", "audio: [base64, 800 characters]"),
        # people
        ("Write to jane.doe+x@mail.example.org.", "Write to [email]."),
        ("mailto:a@b.io, <王@例子.中国>", "mailto:[email], <[email]>"),
        ("card 4111 1111 1111 1111 or 5500-0000-0000-0004", "card [card] or [card]"),
        ("378282246310005 and 3782 822463 10005", "[card] and [card]"),
        ("call +1 (555) 010-0199 or +44 20 7946 0958", "call [phone] or [phone]"),
        ("call +49-89-123456, +8613912345678", "call [phone], [phone]"),
        ("(555) 010-0199 / 555-010-0199 / 555.010.0199 / 212 555 0199", "[phone] / [phone] / [phone] / [phone]"),
        ("139 1234 5678，13912345678", "[phone]，[phone]"),
        ("Tel. 089/1234567, 06 12 34 56 78, (020) 7946 0958", "Tel. [phone], [phone], [phone]"),
    ],
)
def test_secrets_and_personal_data_are_replaced(text: str, expected: str) -> None:
    assert redact_text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "The bearer of good news arrived; bearer responsibilities vary.",
        "Use scikit-learn, task-force-of-the-year and sk-learn-compatible-estimators.",
        "max_tokens: 4096, total_tokens=123456789",
        "def f(token: str, password: Optional[str] = None): token = get_token2()",
        "Passwords: must have 8 characters and 1 digit. The secret: practice.",
        "api_key = os.environ['OPENAI_API_KEY']",
        "https://example.org:8080/a@b http://localhost:8000",
        "@decorator, user@localhost, react@18.2.0, logo@2x.png, a@b",
        "2024-01-31 12:30:45, 31.01.2024, 01/02/2024, 01-02-2024 10:00, 2024 2025 2026 2027",
        "192.168.100.200, 10.0.0.1:8080, 2001:db8::1, version 1.22.333",
        "1234567890 1700000000 1700000000000 4111111111111112 1234 5678 9012 3456",
        "ISBN 978-3-16-148410-0, 3.14159265358979, +1.23456789, -12345678, 1e+1234567890",
        "123e4567-e89b-12d3-a456-426614174000 d41d8cd98f00b204e9800998ecf8427e",
        "$1,234,567.89, 10-20, 100 200 300, 12345678901234567890123",
        "data:text/plain;base64,SGVsbG8=",
        "-" * 300 + "=" * 300 + "a/b" * 100,
        "天气很好，今天 2024年1月31日。",
    ],
)
def test_what_only_looks_alike_stays(text: str) -> None:
    assert redact_text(text) == text


def test_fields_are_redacted_by_their_names_and_all_texts_at_any_depth() -> None:
    value = {
        "messages": [{"content": [{"type": "text", "text": "I am a@b.org"}]}],
        "x_api_key": "anything",
        "Authorization": "anything",
        "password": None,
        "max_tokens": 5,
        "temperature": 0.5,
    }
    assert redact(value) == value | {
        "messages": [{"content": [{"type": "text", "text": "I am [email]"}]}],
        "x_api_key": "[secret]",
        "Authorization": "[secret]",
    }


def test_what_is_nested_without_end_is_left_out() -> None:
    value: object = "a@b.org"
    for _ in range(5000):
        value = [value]
    for _ in range(DEEPEST):
        value = redact(value)
        assert isinstance(value, list)
        (value,) = value
    assert value == "[too deep]"


@given(st.text(st.sampled_from('sk-1a@.b+ 5"=:tokenBearr/\n'), max_size=60))
def test_what_has_been_redacted_stays_as_it_is(text: str) -> None:
    once = redact_text(text)
    assert redact_text(once) == once


def test_a_secret_anywhere_in_a_long_text_is_found() -> None:
    words = "Plain words here, and more of them.\npassword:\n"
    for at in range(PIECE - 200, PIECE + 200, 7):
        text = (words * (at // len(words) + 1))[:at]
        assert redact_text(f"{text} +1 (555) 010-0199\n{words * 100}").count("[phone]") == 1


UNITS = [
    "a",
    "1 ",
    "01 ",
    "+1",
    "+1()",
    "a@",
    "a@a.",
    "x@a-",
    "://a:",
    "token=",
    "token = '",
    'token\\"',
    "bearer ",
    "天",
]
UNITS += [f"eyJ{'a' * 9}.", ";base64,", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear_whatever_is_sent(unit: str) -> None:
    """A fraction of a second; with one pattern of quadratic time it would be an hour."""
    redact_text(unit * (400_000 // len(unit)))

"""Credentials in URLs: refused in fields, which are written to files, and left out of messages.

A URL can have a password before its host, or a signature after its path; whoever reads one of these
may do what its owner may. What libraries say of a failed request quotes the URL.
"""

import re

_HIDDEN = "***"
_OF_USER = re.compile(
    r"(?<=://)[^\s\"'<>/@:]{0,200}:(?!\d+/)[^\s\"'<>@]{0,2000}(?:@[^\s\"'<>@/]{0,2000})?@"
)
"""`user:password`, in which careless writers leave a / or an @ as it is; not a port."""
_OF_WEB = re.compile(r"(?:(?<=https://)|(?<=http://))[^\s\"'<>/?#@]{1,2000}@", re.IGNORECASE)
"""A token alone. A name alone is none elsewhere: abfs://CONTAINER@ACCOUNT, sftp://NAME@HOST."""
_IN_QUERY = re.compile(
    r"([?&;](?:[\w.-]{0,40}(?:signature|credential|token|secret|password|passwd|passphrase"
    r"|api[_-]?key|access[_-]?key|account[_-]?key)[\w.-]{0,40}|sig|sas|auth|key|pwd)=)"
    r"[^\s\"'<>&#]+",
    re.IGNORECASE,
)
"""Of presigned URLs of S3 and GCS, Azure's shared access signatures, and servers' own tokens."""


def redacted(text: str) -> str:
    """Replace the passwords and signatures of all URLs in a text by `***`."""
    text = _OF_WEB.sub(f"{_HIDDEN}@", _OF_USER.sub(f"{_HIDDEN}@", text))
    return _IN_QUERY.sub(rf"\1{_HIDDEN}", text)


def check_no_credential(name: str, value: str) -> None:
    """Refuse a field with a credential in it.

    Args:
        name: of the field.
        value: of the field: a path, a URL or several.

    Raises:
        ValueError: it has one; the message has the value without it.
    """
    shown = redacted(value)
    if shown != value:
        raise ValueError(
            f"{name} is {shown}, with a credential in the URL, and fields are kept in files; leave "
            "it out, and give it by the environment variables or files of the store or server "
            "(docs/reference/security.md)"
        )

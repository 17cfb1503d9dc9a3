"""What to look at when a link was refused and TLS may be the reason; the same words for each broker.

A broker that is spoken to in plain text on a TLS port, or that misses a certificate of ours, says little or nothing:
it closes. So what is said here is a question, where nobody can know.
"""

from __future__ import annotations

import ssl


def of_error(error: BaseException, section: str) -> str:
    """What an error of TLS, or one that it led to, means and what to do; "" where TLS has no part in it.

    Arguments:
        section: of the settings, as ``rabbitmq``.
    """
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, ssl.SSLError):
        inner = inner.__cause__ or inner.__context__
    if inner is None:
        return ""
    if isinstance(inner, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({inner.verify_message}): see ca and hostname of [{section}.tls]"
        )
    reason = inner.reason or str(inner)
    if "ALERT" in reason and "CERTIFICATE" in reason:
        return f"it refused our certificate, or misses one ({reason}): see cert and key of [{section}.tls]"
    if "ALERT" in reason:
        return f"it refused our TLS ({reason}): does it want a certificate (cert and key of [{section}.tls])?"
    return f"no TLS could be agreed on ({reason}): is it a TLS port?"


def of_silence(section: str, *, secure: bool) -> str:
    """What to ask where the other side closed, or said nothing, before it spoke its protocol.

    Arguments:
        secure: whether we spoke TLS.
    """
    if secure:
        return f"is it a TLS port, and does it want a certificate of ours (cert and key of [{section}.tls])?"
    return f"is it a TLS port (enabled of [{section}.tls]), or not the right one?"

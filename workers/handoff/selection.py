"""The one place that picks what carries KV."""

from antiphon.workers.handoff.gloo import GlooTransport
from antiphon.workers.handoff.nccl import NcclTransport
from antiphon.workers.handoff.transport import Transport


def make_transport(name: str, host: str) -> Transport:
    """Make what ``handoff.transport`` names, for links to this address.

    Raises:
        ConfigError: It cannot work here.
    """
    return NcclTransport(host) if name == "nccl" else GlooTransport(host)

"""An HTTP server for ``/metrics``: on an ingress's own port, and beside a worker's sessions."""

import logging
from collections.abc import Callable, Sequence

from aiohttp import web
from aiohttp.log import server_logger

from antiphon.listening import ANY_PORT, listen


class MetricsServer:
    """One port of this process.

    Args:
        render: What ``/metrics`` answers, to anybody.
        logger: Of what goes wrong with HTTP.
    """

    def __init__(self, render: Callable[[], bytes], logger: logging.Logger = server_logger) -> None:
        self._render = render
        self.app = web.Application()  # takes further routes until ``listen``
        self.app.router.add_get("/metrics", self._serve)
        self._runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=1.0, logger=logger)

    async def listen(self, host: str, ports: Sequence[int] = ANY_PORT) -> int:
        """Take the first free port, and return it."""
        await self._runner.setup()
        await web.SockSite(self._runner, listen(host, ports)).start()
        bound: int = self._runner.addresses[0][1]
        return bound

    async def close(self) -> None:
        """Give the port back, if one was taken."""
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.Response:
        return web.Response(body=self._render(), content_type="text/plain", charset="utf-8")

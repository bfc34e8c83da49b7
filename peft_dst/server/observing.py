"""What is known of the server's work from outside: metrics, and a line of the log for each request."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .service import Service


LOGGER = logging.getLogger("peft_dst.server")
# An answer may take a minute or several.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 600)


class Metrics:
    """What Prometheus asks for."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("peft_dst_requests", "Requests answered.", ["path", "status"], **options)
        self.seconds = Histogram(
            "peft_dst_request_seconds", "Time to the end of an answer.", ["path"], buckets=SECONDS, **options
        )
        self.tokens = Counter("peft_dst_tokens", "Tokens read and made.", ["kind"], **options)
        self.registry.register(_Figures(service))


class _Figures:
    """What the engine and the pool count themselves, as it is when it is asked for."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Any]:
        engine, pool = self.service.engine, self.service.pool.statistics
        for kind, name, text, value in (
            (GaugeMetricFamily, "waiting", "Requests that wait.", engine.waiting),
            (GaugeMetricFamily, "running", "Sequences in computation.", engine.running),
            (CounterMetricFamily, "batches", "Batches computed.", engine.computed["batches"]),
            (
                CounterMetricFamily,
                "mixed_batches",
                "Of them those of several deltas.",
                engine.computed["mixed_batches"],
            ),
            (GaugeMetricFamily, "deltas", "Deltas known.", pool.deltas),
            (GaugeMetricFamily, "deltas_ready", "Deltas held in memory.", pool.ready),
            (GaugeMetricFamily, "deltas_bytes", "Bytes of those.", pool.nbytes),
            (GaugeMetricFamily, "deltas_host_bytes", "Bytes of deltas kept as they were read.", pool.host_nbytes),
            (CounterMetricFamily, "delta_hits", "Uses of a delta that was held.", pool.hits),
            (CounterMetricFamily, "delta_loads", "Deltas read and made ready.", pool.loads),
            (CounterMetricFamily, "delta_evictions", "Deltas let go for others.", pool.evictions),
            (CounterMetricFamily, "delta_switches", "Switches of the delta in the weights.", pool.switches),
        ):
            yield kind(f"peft_dst_{name}", text, value=value)


class Observed:
    """Counts and logs each request when its answer has ended, also of a stream."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - begin
            path = scope["route"].path if scope.get("route") is not None else "unknown"
            line = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4)}
            # A stream that ends with an error has noted another status than it was begun with.
            line |= scope.get("state", {}).get("noted", {})
            self.metrics.requests.labels(path, str(line["status"])).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            LOGGER.info("answered", extra={"fields": line})

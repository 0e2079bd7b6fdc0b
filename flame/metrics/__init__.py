"""What a run says about itself: log lines, files, rates, traces."""

from flame.metrics.logger import MetricsLogger
from flame.metrics.profiling import Profiler
from flame.metrics.sources import source_figures
from flame.metrics.throughput import Throughput

__all__ = ["MetricsLogger", "Profiler", "Throughput", "source_figures"]

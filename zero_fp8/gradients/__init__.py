"""A gradient's way: hook -> bucket -> messages -> exchange -> reduced gradient."""

"""The real brokers that tests, benchmarks and demos run against, started on loopback ports of their own.

Owns how each one is installed, configured, started, broken on purpose and stopped: natively on Debian, or by
``docker-compose.test.yml`` where a docker daemon answers. Must never touch a process it did not start, and
never report a broker as up before its protocol answered.
"""

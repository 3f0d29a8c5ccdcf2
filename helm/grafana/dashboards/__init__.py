"""The Grafana dashboards, as code; ``make dashboards`` writes them into the chart as JSON.

Made with Grafana's foundation SDK, which only the ``dev`` extra installs. Every panel names what it
shows, its unit, and in its description what to make of it. Queries are in ``queries``, the look of
panels in ``panels``, variables and links, which all dashboards share, in ``board``.
"""

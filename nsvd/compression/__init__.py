"""From a request to a compressed model: ranks, factors, their exchange, fine steps at the end, a report.

``compress.py`` is the way in. ``strs.py`` is ASVD's rank search, ``sola.py`` SoLA, ``ordered.py`` the way layer by layer of
``best``, whose parts ``request.py`` names.
"""

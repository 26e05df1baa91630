"""The verbs of ``ksmd`` and ``ksmctl``, one module each."""

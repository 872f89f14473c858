"""How ranks are started, which one this process is, where they meet, and which cores it takes. Imports no torch."""

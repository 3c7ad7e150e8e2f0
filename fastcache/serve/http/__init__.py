"""The images API over HTTP: routes, limits, answers, the page, and the server's life."""

"""The report: what a results folder holds, as one HTML file. ``gather`` reads the files, ``charts`` draws, ``page``
writes; the page itself is page.html, page.css and page.js, its texts en.toml and zh.toml."""

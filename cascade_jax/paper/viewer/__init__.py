"""A trace as a page for a browser: one file that asks for nothing else.

    about = document.About("a red ball on gravel", methods.method("cascade", bundle))
    document.drawn(bundle, about, "trace.html")

`patches` decodes what every draft would look like, `contents` is what the page knows, and `document` puts that and the
files of the folder `page` (markup, style, scripts) into one.
"""

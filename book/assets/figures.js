// Each figure opens by itself, to be looked at closely; on a phone one of up to 520 pixels is shown whole (book.css).
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll("article :is(figure, .cell_output) img")) {
    const link = picture.closest("a") ?? document.createElement("a");
    link.classList.add("whole-figure");
    link.href ||= picture.src;
    if (!link.contains(picture)) {
      picture.replaceWith(link);
      link.append(picture);
    }
    const mark = () => link.classList.toggle("fits", picture.naturalWidth <= 520);
    picture.complete ? mark() : picture.addEventListener("load", mark);
  }
  // An interval stays in one line, so that a narrow cell breaks between a value and its interval.
  for (const text of document.querySelectorAll("article td, article td *")) {
    if (text.children.length === 0) text.textContent = text.textContent.replace(/(\[[-\d.]+,) /g, "$1\u00a0");
  }
});

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
  // An interval stays in one line, so that a narrow cell breaks between a value and its interval.  On a phone, the
  // headline may break it.
  const phone = matchMedia("(max-width: 600px)").matches;
  for (const text of document.querySelectorAll("article td, article td *")) {
    if (text.children.length > 0 || (phone && text.closest(".headline"))) continue;
    text.textContent = text.textContent.replace(/(\[[-\d.]+,) /g, "$1\u00a0");
  }
  // What scrolls sideways fades at the side where more is hidden.
  const wide = "pre, .output, .pst-scrollable-table-container, .sortable, div.math, .whole-figure, .slider figure";
  for (const box of document.querySelectorAll(`article :is(${wide})`)) {
    const mark = () => box.classList.toggle("more", box.scrollWidth - box.clientWidth - box.scrollLeft > 4);
    box.addEventListener("scroll", mark, {passive: true});
    new ResizeObserver(mark).observe(box);
  }
});
